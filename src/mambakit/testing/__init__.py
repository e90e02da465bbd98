"""What tests, benchmarks and lessons share: sample inputs of every operator."""
