// Includes METAFAST_VARIANT once for each element type and instruction set (see per_isa.inl). REAL is the type, INTEGER the
// integer of its size; the others are the constants of exp.inl.
// float32::widest_table() and float64::widest_table() are the `table` of the widest that this machine runs.

// In float32 the polynomial is 1 + r + r^2 (...) with the smallest relative error at |r| <= ln 2 / 2, 3e-9, its powers two and two
// so that it is not one chain; and ln 2 as it is rounded is off by 2e-9, which no k makes much of. In float64 it is Taylor's, in
// Horner form, whose error is under half a unit in the last place, and ln 2 comes in two parts.
#define REAL float
#define INTEGER int32_t
#define LOWEST (-88.f)
#define LOG2_E 1.44269504f
#define SHIFTER 12582912.f  // 1.5 * 2^23
#define LESS_LN2_TIMES(x, k) ((x) - (k) * 0.693147181f)
#define EXPONENT_BIAS 127
#define MANTISSA_BITS 23
#define EXP_POLYNOMIAL(r) \
  ((1.f + r) + (r * r) * ((0.49999994f + r * 0.16666521f) + (r * r) * ((0.041668389f + r * 0.0083687101f) + (r * r) * 0.0013814613f)))
namespace float32 {
#include "cpu/isa/per_isa.inl"
}  // namespace float32
#undef REAL
#undef INTEGER
#undef LOWEST
#undef LOG2_E
#undef SHIFTER
#undef LESS_LN2_TIMES
#undef EXPONENT_BIAS
#undef MANTISSA_BITS
#undef EXP_POLYNOMIAL

#define REAL double
#define INTEGER int64_t
#define LOWEST (-709.0)
#define LOG2_E 1.4426950408889634
#define SHIFTER 6755399441055744.0  // 1.5 * 2^52
#define LESS_LN2_TIMES(x, k) (((x) - (k) * 0.693145751953125) - (k) * 1.42860682030941723212e-6)
#define EXPONENT_BIAS 1023
#define MANTISSA_BITS 52
#define EXP_POLYNOMIAL(r)                                                                                            \
  (1 + r * (1 + r * (1. / 2 + r * (1. / 6 + r * (1. / 24 + r * (1. / 120 + r * (1. / 720 + r * (1. / 5040 + r *     \
  (1. / 40320 + r * (1. / 362880 + r * (1. / 3628800 + r * (1. / 39916800 + r * (1. / 479001600 + r *               \
  (1. / 6227020800))))))))))))))
namespace float64 {
#include "cpu/isa/per_isa.inl"
}  // namespace float64
