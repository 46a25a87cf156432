// What happens to a panel's scores in each pass: the matrix products that make them, and what is done to their rows.
#pragma once

#include "cpu/attention_panels.h"
#include "cpu/attention_rows.h"
#include "cpu/gemm.h"

namespace metafast {

// The three products of a pass. x is [count, columns] in a panel's buffer, rows is [count, depth], keys [columns, depth].
// x = alpha rows keys^T + beta x
template <typename T>
void outer(const Panel& panel, int64_t depth, T alpha, Operand<const T> rows, Operand<const T> keys, T beta, T* x, int64_t stride) {
  gemm(false, true, panel.count, panel.columns(), depth, alpha, rows.data, rows.stride, keys.data, keys.stride, beta, x, stride);
}

// rows = alpha x keys + beta rows
template <typename T>
void to_rows(const Panel& panel, int64_t depth, T alpha, const T* x, int64_t stride, Operand<const T> keys, T beta, Operand<T> rows) {
  gemm(false, false, panel.count, depth, panel.columns(), alpha, x, stride, keys.data, keys.stride, beta, rows.data, rows.stride);
}

// keys += alpha x^T rows
template <typename T>
void to_keys(const Panel& panel, int64_t depth, T alpha, const T* x, int64_t stride, Operand<const T> rows, Operand<T> keys) {
  gemm(true, false, panel.columns(), depth, panel.count, alpha, x, stride, rows.data, rows.stride, T(1), keys.data, keys.stride);
}

template <typename T>
void add_mask(const Matrices<const T>& mask, const Panel& panel, T* s, int64_t stride) {
  const T* data = mask.at(panel.batch, panel.head) + panel.first * mask.row_stride + panel.begin * mask.column_stride;
  for (int64_t i = 0; i < panel.count; ++i) {
    attention_rows<T>().add_bias(panel.columns(), data + i * mask.row_stride, mask.column_stride, s + i * stride);
  }
}

// scale q k^T under the mask, the window excepted.
template <typename T>
void scores(const Problem<T>& problem, const Panel& panel, T* s, int64_t stride) {
  outer(panel, problem.depth, problem.scale, rows_of(problem.q, panel), keys_of(problem.k, panel, problem.group()), T(0), s, stride);
  if (problem.bias) return add_mask(*problem.bias, panel, s, stride);
  if (!problem.keep) return;
  const auto& keep = *problem.keep;
  const bool* data = keep.at(panel.batch, panel.head) + panel.first * keep.row_stride + panel.begin * keep.column_stride;
  for (int64_t i = 0; i < panel.count; ++i) {
    attention_rows<T>().keep_only(panel.columns(), data + i * keep.row_stride, keep.column_stride, s + i * stride);
  }
}

// Calls row(n, scores of the row's window, statistics of the row) for every row, and zeroes what is outside of the window.
template <typename T, typename Scalar, typename Row>
void for_each_window(const Problem<T>& problem, const Panel& panel, Scalar* statistics, T* s, int64_t stride, Row row) {
  Scalar* of_head = statistics + (panel.batch * problem.heads + panel.head) * problem.rows * 2;
  for (int64_t i = 0; i < panel.count; ++i) {
    const Range range = row_range(problem, panel, i);
    T* of_row = s + i * stride;
    row(range.last - range.first, of_row + range.first, of_head + (panel.first + i) * 2);
    std::fill(of_row, of_row + range.first, T(0));
    std::fill(of_row + range.last, of_row + panel.columns(), T(0));
  }
}

// The softmax again, from the saved statistics.
template <typename T>
void probabilities(const Problem<T>& problem, const Panel& panel, const T* statistics, T* p, int64_t stride) {
  scores(problem, panel, p, stride);
  for_each_window(problem, panel, statistics, p, stride, attention_rows<T>().probabilities);
}

// The factors that dropout puts on a row of weights, 0 or 1 / (1 - p): made anew for each row, in one buffer.
template <typename T>
class DropoutFactors {
 public:
  explicit DropoutFactors(const Problem<T>& problem, const Panel& panel)
      : problem_(problem), panel_(panel), factors_(problem.dropout ? panel.columns() + 8 : 0) {}

  // Draws those of the panel's row i. Without dropout nothing is drawn, and multiply does nothing.
  void draw(int64_t i) {
    if (!problem_.dropout) return;
    const Dropout& dropout = *problem_.dropout;
    // Words come in groups of four columns, of which the panel may begin within one.
    const int64_t group = panel_.begin / 4, groups = (panel_.end + 3) / 4 - group;
    attention_rows<T>().dropout(groups, group, panel_.first + i, panel_.head, dropout.seeds[panel_.batch], dropout.threshold,
                                T(dropout.scale), factors_.data());
    row_ = factors_.data() + (panel_.begin - group * 4);
  }

  void multiply(T* row) const {
    if (problem_.dropout) attention_rows<T>().multiply(panel_.columns(), row_, row);
  }

 private:
  const Problem<T>& problem_;
  const Panel& panel_;
  std::vector<T> factors_;
  const T* row_ = nullptr;
};

// p becomes the dropped weights Z, e the gradient of the scores. Before, e is anything.
template <typename T>
void score_gradients(const Problem<T>& problem, const Panel& panel, const T* statistics, Operand<const T> grad_out, T* p, T* e, int64_t stride) {
  probabilities(problem, panel, statistics, p, stride);
  outer(panel, problem.value_depth, T(1), grad_out, keys_of(problem.v, panel, problem.group()), T(0), e, stride);
  DropoutFactors<T> factors(problem, panel);
  for (int64_t i = 0; i < panel.count; ++i) {
    T *p_row = p + i * stride, *e_row = e + i * stride;
    factors.draw(i);
    factors.multiply(e_row);
    attention_rows<T>().softmax_jacobian(panel.columns(), p_row, e_row);
    factors.multiply(p_row);
  }
}

// t = the tangent of the scores.
template <typename T>
void tangent_scores(const Problem<T>& problem, const Tangents<T>& tangent, const Panel& panel, T* t, int64_t stride) {
  outer(panel, problem.depth, problem.scale, rows_of(tangent.q, panel), keys_of(problem.k, panel, problem.group()), T(0), t, stride);
  outer(panel, problem.depth, problem.scale, rows_of(problem.q, panel), keys_of(tangent.k, panel, problem.group()), T(1), t, stride);
  if (tangent.mask) add_mask(*tangent.mask, panel, t, stride);
}

// p becomes the dropped weights Z, t their tangent.
template <typename T>
void tangent_weights(const Problem<T>& problem, const Tangents<T>& tangent, const Panel& panel, const T* statistics, T* p, T* t, int64_t stride) {
  probabilities(problem, panel, statistics, p, stride);
  tangent_scores(problem, tangent, panel, t, stride);
  DropoutFactors<T> factors(problem, panel);
  for (int64_t i = 0; i < panel.count; ++i) {
    T *p_row = p + i * stride, *t_row = t + i * stride;
    attention_rows<T>().softmax_jacobian(panel.columns(), p_row, t_row);
    factors.draw(i);
    factors.multiply(p_row);
    factors.multiply(t_row);
  }
}

// p becomes the dropped weights Z, t their tangent, e the gradient of the scores, f the tangent of that.
template <typename T>
void tangent_score_gradients(const Problem<T>& problem, const Tangents<T>& tangent, const Panel& panel, const T* statistics,
                             Operand<const T> grad_out, const std::optional<Operand<const T>>& tangent_grad_out,
                             T* p, T* t, T* e, T* f, int64_t stride) {
  const int64_t dv = problem.value_depth;
  const auto v = keys_of(problem.v, panel, problem.group());
  probabilities(problem, panel, statistics, p, stride);
  tangent_scores(problem, tangent, panel, t, stride);
  outer(panel, dv, T(1), grad_out, v, T(0), e, stride);
  outer(panel, dv, T(1), grad_out, keys_of(tangent.v, panel, problem.group()), T(0), f, stride);
  if (tangent_grad_out) outer(panel, dv, T(1), *tangent_grad_out, v, T(1), f, stride);
  DropoutFactors<T> factors(problem, panel);
  for (int64_t i = 0; i < panel.count; ++i) {
    T *p_row = p + i * stride, *t_row = t + i * stride, *e_row = e + i * stride, *f_row = f + i * stride;
    factors.draw(i);
    factors.multiply(e_row);
    factors.multiply(f_row);
    attention_rows<T>().backward_jvp(panel.columns(), p_row, t_row, e_row, f_row);
    factors.multiply(p_row);
    factors.multiply(t_row);
  }
}

}  // namespace metafast
