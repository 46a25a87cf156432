// Included once for each element type and instruction set by attention_rows.cpp, which defines REAL, INTEGER, the
// constants of exp and CAPABILITY_NAMESPACE. Plain functions, not templates: a target pragma reaches what is written
// under it, not what is instantiated from it. The loops are for the vectoriser; `omp simd` allows it to reorder the sums.

namespace CAPABILITY_NAMESPACE {

#include "cpu/isa/exp.inl"

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
    // As bytes: the vectoriser does not see through bool.
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(keep);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const INTEGER kept = bytes[j];
      score[j] = kept != 0 ? score[j] : lowest;
    }
  } else {
    for (int64_t j = 0; j < n; ++j) score[j] = keep[j * stride] ? score[j] : lowest;
  }
}

void softmax(int64_t n, REAL* __restrict score, REAL* __restrict statistics) {
  REAL top = -std::numeric_limits<REAL>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = score[j] > top ? score[j] : top;
  if (top == -std::numeric_limits<REAL>::infinity()) {
    // Nothing may be attended to, unless a NaN hides among the scores: it is passed on, not swallowed.
    REAL total = 0;
    for (int64_t j = 0; j < n; ++j) total += score[j] == top ? REAL(0) : score[j];
    for (int64_t j = 0; j < n; ++j) score[j] = total;
    statistics[0] = total == REAL(0) ? top : total;
    statistics[1] = REAL(0);
    return;
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
  statistics[0] = top;
  statistics[1] = std::log(sum);
}

void probabilities(int64_t n, REAL* __restrict score, const REAL* __restrict statistics) {
  const REAL top = statistics[0], log_sum = statistics[1];
  if (top == -std::numeric_limits<REAL>::infinity()) {
    for (int64_t j = 0; j < n; ++j) score[j] = REAL(0);
    return;
  }
  REAL sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const REAL e = exp_nonpositive((score[j] - top) - log_sum);
    score[j] = e;
    sum += e;
  }
  // The statistics are rounded. The backward pass relies on rows that sum to 1: what they are off, times a large common offset
  // of the keys, would end up in the gradient of the query.
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

// Philox-4x32-10 (Salmon et al., SC 2011) at the counter (group, row, head, 0) under the key that the seed is.
void dropout(int64_t groups, int64_t first_group, int64_t row, int64_t head, int64_t seed, uint32_t threshold, REAL scale,
             REAL* __restrict factors) {
  const uint32_t start = uint32_t(first_group), key0 = uint32_t(seed), key1 = uint32_t(uint64_t(seed) >> 32);
  const uint32_t row_word = uint32_t(row), head_word = uint32_t(head);
#pragma omp simd
  for (int64_t group = 0; group < groups; ++group) {
    uint32_t c0 = start + uint32_t(group), c1 = row_word, c2 = head_word, c3 = 0, k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = uint64_t(c0) * 0xD2511F53u, second = uint64_t(c2) * 0xCD9E8D57u;
      c0 = uint32_t(second >> 32) ^ c1 ^ k0;
      c1 = uint32_t(second);
      c2 = uint32_t(first >> 32) ^ c3 ^ k1;
      c3 = uint32_t(first);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    factors[4 * group] = c0 >= threshold ? scale : REAL(0);
    factors[4 * group + 1] = c1 >= threshold ? scale : REAL(0);
    factors[4 * group + 2] = c2 >= threshold ? scale : REAL(0);
    factors[4 * group + 3] = c3 >= threshold ? scale : REAL(0);
  }
}

void multiply(int64_t n, const REAL* __restrict factors, REAL* __restrict x) {
  for (int64_t j = 0; j < n; ++j) x[j] *= factors[j];
}

const AttentionRows<REAL> table{add_bias, keep_only, softmax, probabilities, softmax_jacobian, backward_jvp, dropout, multiply};

}  // namespace CAPABILITY_NAMESPACE
