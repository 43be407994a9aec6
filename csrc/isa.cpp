#include "isa.hpp"

#include <algorithm>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernels.hpp"
#include "training.hpp"

namespace mar {

#define MAR_DECLARE(name)             \
  namespace name {                    \
  extern const Kernels kernels;       \
  extern const Training training;     \
  }
MAR_DECLARE(generic)
#if defined(__x86_64__)
MAR_DECLARE(avx2)
#if defined(MAR_HAS_AVXVNNI)
MAR_DECLARE(avxvnni)
#endif
MAR_DECLARE(avx512)
MAR_DECLARE(amx)
#endif
#undef MAR_DECLARE

namespace {

struct Candidate {
  const char* name;
  const Kernels* kernels;
  const Training* training;
  std::vector<std::string> needs;  // besides the platform's baseline: what CMakeLists.txt lets the compiler use
};

std::vector<Candidate> candidates() {
  std::vector<Candidate> list;
#if defined(__x86_64__)
  const std::vector<std::string> wide = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16"};
  std::vector<std::string> tiles = wide;
  tiles.insert(tiles.end(), {"amxtile", "amxint8"});
  list.push_back({"amx", &amx::kernels, &amx::training, tiles});
  list.push_back({"avx512", &avx512::kernels, &avx512::training, wide});
#if defined(MAR_HAS_AVXVNNI)
  list.push_back({"avxvnni", &avxvnni::kernels, &avxvnni::training, {"avx2", "fma", "avxvnni"}});
#endif
  list.push_back({"avx2", &avx2::kernels, &avx2::training, {"avx2", "fma"}});
#endif
  list.push_back({"generic", &generic::kernels, &generic::training, {}});
  return list;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

#if defined(__x86_64__)
// Whether the operating system saves AMX's tiles; Linux does so for processes that ask.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
#define MAR_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name);
  MAR_FEATURE("avx2")
  MAR_FEATURE("fma")
  MAR_FEATURE("avx512f")
  MAR_FEATURE("avx512bw")
  MAR_FEATURE("avx512dq")
  MAR_FEATURE("avx512vl")
  MAR_FEATURE("avx512vnni")
  MAR_FEATURE("avx512bf16")
#undef MAR_FEATURE
  unsigned a, b, c, d = 0;
  // Not every compiler knows it by name; the operating system saves what it takes where it does so for avx2.
#if defined(MAR_EMULATE_AVXVNNI)
  const bool dots = true;
#else
  const bool dots = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
  if (dots && __builtin_cpu_supports("avx2")) found.push_back("avxvnni");
  if (tiles_permitted()) {
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    if (d >> 24 & 1) found.push_back("amxtile");
    if (d >> 25 & 1) found.push_back("amxint8");
  }
#endif
  return found;
}

Variant choose_variant(const std::string& forced, const std::vector<std::string>& features) {
  std::vector<std::string> names;
  for (const auto& one : candidates()) {
    std::vector<std::string> lacking;
    for (const auto& need : one.needs)
      if (std::find(features.begin(), features.end(), need) == features.end()) lacking.push_back(need);
    if (forced.empty() ? lacking.empty() : forced == one.name) {
      if (!lacking.empty())
        throw std::invalid_argument("MAR_ISA is '" + forced + "', but this CPU lacks " + joined(lacking) +
                                    "; unset it or force a lower one.");
      const std::string why = forced.empty() ? "the best that this CPU runs" : "forced by MAR_ISA";
      const std::string needs = one.needs.empty() ? "nothing beyond the platform's baseline" : joined(one.needs);
      return {one.name, why + " (needs " + needs + ")", features, one.kernels, one.training};
    }
    names.push_back(one.name);
  }
  throw std::invalid_argument("MAR_ISA is '" + forced + "'; use one of " + joined(names) + ".");
}

}  // namespace mar
