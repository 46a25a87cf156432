// exp for x <= 0 up to rounding: x = k ln 2 + r with |r| <= ln 2 / 2, a Taylor polynomial in r, k added to the exponent.
// Adding and subtracting SHIFTER rounds to the nearest integer with every instruction set. Below UNDERFLOW, and so for
// -inf, the result is 0; NaN stays NaN.
inline REAL exp_nonpositive(REAL x) {
  const REAL clamped = x < UNDERFLOW_LIMIT ? UNDERFLOW_LIMIT : x;
  const REAL shifted = clamped * LOG2_E + SHIFTER;
  const REAL k = shifted - SHIFTER;
  const REAL r = (clamped - k * LN2_HIGH) - k * LN2_LOW;
  // A built-in cast where memcpy would do: the vectoriser sees through it.
  const INTEGER bits = (__builtin_bit_cast(INTEGER, shifted) + EXPONENT_BIAS) << MANTISSA_BITS;
  const REAL power = __builtin_bit_cast(REAL, bits);
  const REAL result = EXP_POLYNOMIAL(r) * power;
  return x < UNDERFLOW_LIMIT ? REAL(0) : result;
}
