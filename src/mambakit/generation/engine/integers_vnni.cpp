// Products with integers on processors with AVX-512 and its VNNI instructions, asked for at run time: four products
// of bytes and their sum in one instruction, where the instruction level itself needs two to seven.

#include "panels.h"

#if defined(MAMBAKIT_AVX512) && (defined(__GNUC__) || defined(__clang__))

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512vnni")
#endif
#define MAMBAKIT_VNNI 1
#define MAMBAKIT_DOT vnni
#include "integers.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace mambakit {
namespace decode {

bool vnni::available() { return __builtin_cpu_supports("avx512vnni"); }

}  // namespace decode
}  // namespace mambakit

#else

namespace mambakit {
namespace decode {
namespace vnni {

bool available() { return false; }
void multiply_int8(const char*, const Input&, int64_t, Results) {}
void multiply_int4(const char*, const Input&, int64_t, Results) {}

}  // namespace vnni
}  // namespace decode
}  // namespace mambakit

#endif
