// Which vector instructions the kernels may use on this machine. Nothing is compiled with -march=native: what is shipped
// holds a baseline and wider variants, and the choice is made once, at run time.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

// Tile instructions are compiled where the compiler knows them and the system lets a process ask for them.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define METAFAST_HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace metafast {

// amx: tiles of bfloat16, and AVX-512 for the rest.
enum class Capability { baseline, avx2, avx512, amx };

inline const char* capability_name(Capability capability) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "amx"};
  return names[int(capability)];
}

// Whether the machine multiplies tiles of bfloat16, and the system lets this process: the registers are large, so Linux saves them
// only for those that ask.
inline bool may_use_tiles() {
#ifdef METAFAST_HAS_TILES
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, avx512_bf16 = 1u << 5;
  constexpr int request_permission = 0x1023, tile_data = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & avx512_bf16)) return false;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

inline Capability widest_capability() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && may_use_tiles()) return Capability::amx;
  return avx512 ? Capability::avx512 : avx2 ? Capability::avx2 : Capability::baseline;
#else
  return Capability::baseline;
#endif
}

// METAFAST_CPU_CAPABILITY=baseline|avx2|avx512 asks for less than the machine has, to compare variants.
inline Capability cpu_capability() {
  static const Capability found = [] {
    const char* asked = std::getenv("METAFAST_CPU_CAPABILITY");
    Capability most = Capability::amx;
    for (Capability one : {Capability::baseline, Capability::avx2, Capability::avx512}) {
      if (asked && std::strcmp(asked, capability_name(one)) == 0) most = one;
    }
    return std::min(most, widest_capability());
  }();
  return found;
}

}  // namespace metafast
