// Which vector instructions the kernels may use on this machine. Nothing is compiled with -march=native: what is shipped
// holds a baseline and wider variants, and the choice is made once, at run time.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace metafast {

enum class Capability { baseline, avx2, avx512 };

inline const char* capability_name(Capability capability) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[int(capability)];
}

inline Capability widest_capability() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Capability::avx512 : avx2 ? Capability::avx2 : Capability::baseline;
#else
  return Capability::baseline;
#endif
}

// METAFAST_CPU_CAPABILITY=baseline|avx2 asks for less than the machine has, to compare variants.
inline Capability cpu_capability() {
  static const Capability found = [] {
    const char* asked = std::getenv("METAFAST_CPU_CAPABILITY");
    Capability most = Capability::avx512;
    for (Capability one : {Capability::baseline, Capability::avx2}) {
      if (asked && std::strcmp(asked, capability_name(one)) == 0) most = one;
    }
    return std::min(most, widest_capability());
  }();
  return found;
}

}  // namespace metafast
