// Includes METAFAST_VARIANT once for each element type and instruction set (see variants.inl). REAL is the type, INTEGER the
// integer of its size; the others are the constants of exp.inl.
// single::widest_table() and precise::widest_table() are the `table` of the widest that this machine runs.

// Taylor coefficients 1/i!, in Horner form: the error at |r| <= ln 2 / 2 is under half a unit in the last place.
#define REAL float
#define INTEGER int32_t
#define UNDERFLOW_LIMIT (-87.3f)
#define LOG2_E 1.44269504f
#define SHIFTER 12582912.f  // 1.5 * 2^23
#define LN2_HIGH 0.693359375f
#define LN2_LOW (-2.12194440e-4f)
#define EXPONENT_BIAS 127
#define MANTISSA_BITS 23
#define EXP_POLYNOMIAL(r) \
  (1.f + r * (1.f + r * (0.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720 + r * (1.f / 5040))))))))
namespace single {
#include "cpu/variants.inl"
}  // namespace single
#undef REAL
#undef INTEGER
#undef UNDERFLOW_LIMIT
#undef LOG2_E
#undef SHIFTER
#undef LN2_HIGH
#undef LN2_LOW
#undef EXPONENT_BIAS
#undef MANTISSA_BITS
#undef EXP_POLYNOMIAL

#define REAL double
#define INTEGER int64_t
#define UNDERFLOW_LIMIT (-708.0)
#define LOG2_E 1.4426950408889634
#define SHIFTER 6755399441055744.0  // 1.5 * 2^52
#define LN2_HIGH 0.693145751953125
#define LN2_LOW 1.42860682030941723212e-6
#define EXPONENT_BIAS 1023
#define MANTISSA_BITS 52
#define EXP_POLYNOMIAL(r)                                                                                            \
  (1 + r * (1 + r * (1. / 2 + r * (1. / 6 + r * (1. / 24 + r * (1. / 120 + r * (1. / 720 + r * (1. / 5040 + r *     \
  (1. / 40320 + r * (1. / 362880 + r * (1. / 3628800 + r * (1. / 39916800 + r * (1. / 479001600 + r *               \
  (1. / 6227020800))))))))))))))
namespace precise {
#include "cpu/variants.inl"
}  // namespace precise
