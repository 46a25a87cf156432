// The elementwise half of attention on the CPU: what happens to one row of a panel between two matrix products.
#pragma once

#include <cstdint>

namespace metafast {

template <typename T>
struct AttentionRows {
  // score += bias, or = -inf where keep is false; the stride is that of bias or keep along the row.
  void (*add_bias)(int64_t n, const T* bias, int64_t stride, T* score);
  void (*keep_only)(int64_t n, const bool* keep, int64_t stride, T* score);

  // score becomes softmax(score); returns its log-sum-exp, -inf (and zeros) where every score is -inf.
  T (*softmax)(int64_t n, T* score);
  // score becomes exp(score - lse): the same softmax, from the saved statistic.
  void (*probabilities)(int64_t n, T lse, T* score);

  // x becomes P (x - sum(P x)), the softmax's symmetric Jacobian at x: dS from dP, and the tangent of P from that of S.
  void (*softmax_jacobian)(int64_t n, const T* p, T* x);

  // In: t the tangent of the scores, e = dP, f = the tangent of dP.
  // Out: t the tangent of P, e = dS, f = the tangent of dS.
  void (*backward_jvp)(int64_t n, const T* p, T* t, T* e, T* f);
};

// The widest variant that this machine runs.
template <typename T>
const AttentionRows<T>& attention_rows();

}  // namespace metafast
