// The C++ tests, on every variant that this CPU runs; for a build with sanitizers (CMakeLists.txt, MAR_SANITIZE).
#include "check.hpp"

int main() {
  test_isa();
  test_pool();
  for (const char* name : {"generic", "avx2", "avxvnni", "avx512", "amx"}) {
    mar::Variant variant;
    try {
      variant = mar::choose_variant(name, mar::cpu_features());
    } catch (const std::exception& error) {
      std::printf("%s: left out, %s\n", name, error.what());
      continue;
    }
    test_kernels(variant);
    test_model(variant);
    test_training(variant);
    std::printf("%s: passed\n", name);
  }
}
