// Included once for each element type and instruction set by attention_rows.cpp, which defines REAL, INTEGER, the
// constants of exp and CAPABILITY_NAMESPACE. Plain functions, not templates: a target pragma reaches what is written
// under it, not what is instantiated from it. The loops are for the vectoriser; `omp simd` allows it to reorder the sums.

namespace CAPABILITY_NAMESPACE {

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

void add_bias(int64_t n, const REAL* __restrict bias, int64_t stride, REAL* __restrict score) {
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) score[j] += bias[j];
  } else {
    for (int64_t j = 0; j < n; ++j) score[j] += bias[j * stride];
  }
}

void keep_only(int64_t n, const bool* __restrict keep, int64_t stride, REAL* __restrict score) {
  const REAL lowest = -std::numeric_limits<REAL>::infinity();
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) score[j] = keep[j] ? score[j] : lowest;
  } else {
    for (int64_t j = 0; j < n; ++j) score[j] = keep[j * stride] ? score[j] : lowest;
  }
}

REAL softmax(int64_t n, REAL* score) {
  REAL top = -std::numeric_limits<REAL>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = score[j] > top ? score[j] : top;
  if (top == -std::numeric_limits<REAL>::infinity()) {
    // Nothing may be attended to, unless a NaN hides among the scores: it is passed on, not swallowed.
    REAL total = 0;
    for (int64_t j = 0; j < n; ++j) total += score[j] == top ? REAL(0) : score[j];
    for (int64_t j = 0; j < n; ++j) score[j] = total;
    return total == REAL(0) ? top : total;
  }
  REAL sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const REAL e = exp_nonpositive(score[j] - top);
    score[j] = e;
    sum += e;
  }
  const REAL inverse = REAL(1) / sum;
  for (int64_t j = 0; j < n; ++j) score[j] *= inverse;
  return top + std::log(sum);
}

void probabilities(int64_t n, REAL lse, REAL* score) {
  if (lse == -std::numeric_limits<REAL>::infinity()) {
    for (int64_t j = 0; j < n; ++j) score[j] = REAL(0);
    return;
  }
  REAL sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const REAL e = exp_nonpositive(score[j] - lse);
    score[j] = e;
    sum += e;
  }
  // lse is rounded, and the larger it is the more. The backward pass relies on rows that sum to 1: what they are off, times a
  // large common offset of the keys, would end up in the gradient of the query.
  const REAL inverse = REAL(1) / sum;
  for (int64_t j = 0; j < n; ++j) score[j] *= inverse;
}

void softmax_jacobian(int64_t n, const REAL* __restrict p, REAL* __restrict x) {
  REAL mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t j = 0; j < n; ++j) mean += p[j] * x[j];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] = p[j] * (x[j] - mean);
}

void backward_jvp(int64_t n, const REAL* __restrict p, REAL* __restrict t, REAL* __restrict e, REAL* __restrict f) {
  REAL mu = 0, d = 0, f_mean = 0;
#pragma omp simd reduction(+ : mu, d, f_mean)
  for (int64_t j = 0; j < n; ++j) {
    mu += p[j] * t[j];
    d += p[j] * e[j];
    f_mean += p[j] * f[j];
  }
  // The tangent of d, from centred factors: with a large common offset in t or e the uncentred sum would cancel.
  REAL covariance = 0;
#pragma omp simd reduction(+ : covariance)
  for (int64_t j = 0; j < n; ++j) {
    t[j] -= mu;
    e[j] -= d;
    covariance += p[j] * t[j] * e[j];
  }
  const REAL tangent_d = covariance + f_mean;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const REAL tangent_p = p[j] * t[j];
    f[j] = tangent_p * e[j] + p[j] * (f[j] - tangent_d);
    e[j] *= p[j];
    t[j] = tangent_p;
  }
}

const AttentionRows<REAL> table{add_bias, keep_only, softmax, probabilities, softmax_jacobian, backward_jvp};

}  // namespace CAPABILITY_NAMESPACE
