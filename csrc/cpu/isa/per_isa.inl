// Includes METAFAST_VARIANT once for each instruction set: there VECTOR_BYTES is the size of its vectors, and
// CAPABILITY_NAMESPACE a namespace of its own. widest_table() is the `table` of the widest that this machine runs.
// The including file has included all standard headers before, so that no inline function of theirs is built for an
// instruction set that the machine may lack.

#define CAPABILITY_NAMESPACE baseline
#define VECTOR_BYTES 16
#include METAFAST_VARIANT
#undef VECTOR_BYTES
#undef CAPABILITY_NAMESPACE

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define CAPABILITY_NAMESPACE avx2
#define VECTOR_BYTES 32
#include METAFAST_VARIANT
#undef VECTOR_BYTES
#undef CAPABILITY_NAMESPACE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#define CAPABILITY_NAMESPACE avx512
#define VECTOR_BYTES 64
#include METAFAST_VARIANT
#undef VECTOR_BYTES
#undef CAPABILITY_NAMESPACE
#pragma GCC pop_options

inline const auto& widest_table() {
  switch (cpu_capability()) {
    case Capability::amx:
    case Capability::avx512: return avx512::table;
    case Capability::avx2: return avx2::table;
    default: return baseline::table;
  }
}

#else

inline const auto& widest_table() { return baseline::table; }

#endif
