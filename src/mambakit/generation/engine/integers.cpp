// Products with integers on any processor of the library's instruction level.

#define MAMBAKIT_DOT plain
#include "integers.h"
