// exp for x <= 0 up to rounding: x = k ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, k added to the exponent.
// Adding and subtracting SHIFTER rounds to the nearest integer with every instruction set. What is below LOWEST, and so -inf, is
// taken for LOWEST, where 2^k is 0 in these bits; NaN stays NaN.
inline REAL exp_nonpositive(REAL x) {
  const REAL clamped = x < LOWEST ? LOWEST : x;
  const REAL shifted = clamped * LOG2_E + SHIFTER;
  const REAL k = shifted - SHIFTER;
  const REAL r = LESS_LN2_TIMES(clamped, k);
  // A built-in cast where memcpy would do: the vectoriser sees through it.
  const INTEGER bits = (__builtin_bit_cast(INTEGER, shifted) + EXPONENT_BIAS) << MANTISSA_BITS;
  const REAL power = __builtin_bit_cast(REAL, bits);
  return EXP_POLYNOMIAL(r) * power;
}
