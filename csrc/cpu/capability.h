// Which vector instructions the kernels may use on this machine. Nothing is compiled with -march=native: what is shipped
// holds a baseline and wider variants, and the choice is made once, at run time.
#pragma once

namespace metafast {

enum class Capability { baseline, avx2 };

inline Capability cpu_capability() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const Capability found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
      ? Capability::avx2
      : Capability::baseline;
  return found;
#else
  return Capability::baseline;
#endif
}

inline const char* capability_name(Capability capability) {
  return capability == Capability::avx2 ? "avx2" : "baseline";
}

}  // namespace metafast
