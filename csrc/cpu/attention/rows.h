// The elementwise half of attention on the CPU: what happens to one row of a panel between two matrix products.
#pragma once

#include <cstdint>

namespace metafast {

template <typename T>
struct AttentionRows {
  // score += bias, or = -inf where keep is false; the stride is that of bias or keep along the row.
  void (*add_bias)(int64_t n, const T* bias, int64_t stride, T* score);
  void (*keep_only)(int64_t n, const bool* keep, int64_t stride, T* score);

  // score becomes softmax(score). statistics becomes the largest score and the log of the sum of exp(score - that): two numbers,
  // as their sum would round the second away where a mask adds very much. Zeros and (-inf, 0) where every score is -inf.
  void (*softmax)(int64_t n, T* score, T* statistics);
  // score becomes the same softmax, from the saved statistics.
  void (*probabilities)(int64_t n, T* score, const T* statistics);

  // x becomes P (x - sum(P x)), the softmax's symmetric Jacobian at x: dS from dP, and the tangent of P from that of S.
  void (*softmax_jacobian)(int64_t n, const T* p, T* x);

  // In: t the tangent of the scores, e = dP, f = the tangent of dP.
  // Out: t the tangent of P, e = dS, f = the tangent of dS.
  void (*backward_jvp)(int64_t n, const T* p, T* t, T* e, T* f);

  // factors = scale where dropout keeps the weight and 0 elsewhere, for four columns of each of the groups from first_group on
  // (reference.py says which weights are kept).
  void (*dropout)(int64_t groups, int64_t first_group, int64_t row, int64_t head, int64_t seed, uint32_t threshold, T scale, T* factors);
  void (*multiply)(int64_t n, const T* factors, T* x);
};

// The widest variant that this machine runs.
template <typename T>
const AttentionRows<T>& attention_rows();

}  // namespace metafast
