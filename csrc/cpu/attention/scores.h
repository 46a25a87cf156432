// What happens to a panel's scores in each pass: the matrix products that make them, and what is done to their rows.
#pragma once

#include <initializer_list>

#include "cpu/attention/panels.h"
#include "cpu/attention/rows.h"

namespace metafast {

// The three products of a pass, each a sum over pairs of operands. x is [count, columns] in a panel's buffer, rows is
// [count, depth], keys [columns, depth].
template <typename T>
using Pairs = std::initializer_list<Factors<T>>;

template <typename T>
Factors<T> pair(Operand<const T> left, Operand<const T> right) {
  return {left.data, left.stride, right.data, right.stride};
}

// x = alpha sum rows keys^T; keys as Scratch has laid them out
template <typename T>
void outer(const Problem<T>& problem, const Panel& panel, int64_t depth, T alpha, Pairs<T> pairs, T* x, int64_t stride) {
  problem.products.outer(panel.count, panel.columns(), depth, alpha, int64_t(pairs.size()), pairs.begin(), x, stride);
}

// rows = alpha sum x keys; keys as Scratch has laid them out
template <typename T>
void to_rows(const Problem<T>& problem, const Panel& panel, int64_t depth, T alpha, Pairs<T> pairs, Operand<T> rows) {
  problem.products.to_rows(panel.count, panel.columns(), depth, alpha, int64_t(pairs.size()), pairs.begin(), rows.data, rows.stride);
}

// sum = alpha sum x^T rows, or sum + that
template <typename T>
void to_keys(const Problem<T>& problem, const Panel& panel, const Scratch<T>& scratch, int64_t depth, T alpha, Pairs<T> pairs, KeySum<T> sum) {
  Factors<T> factors[2];
  int64_t terms = 0;
  for (const auto& [x, x_stride, rows, row_stride] : pairs) {
    factors[terms] = pair({x, x_stride}, scratch.slices_of_rows(terms, panel.count, depth, rows, row_stride));
    ++terms;
  }
  problem.products.to_keys(panel.count, panel.columns(), depth, alpha, terms, factors, sum.begun, sum.rows.data, sum.rows.stride);
}

template <typename T>
void add_mask(const Matrices<const T>& mask, const Panel& panel, T* s, int64_t stride) {
  const T* data = mask.at(panel.batch, panel.head) + panel.first * mask.row_stride + panel.begin * mask.column_stride;
  for (int64_t i = 0; i < panel.count; ++i) {
    attention_rows<T>().add_bias(panel.columns(), data + i * mask.row_stride, mask.column_stride, s + i * stride);
  }
}

// s = scale q k^T under the mask, the window excepted.
template <typename T>
void scores(const Problem<T>& problem, const Panel& panel, const Scratch<T>& scratch, T* s) {
  const int64_t stride = scratch.stride;
  outer(problem, panel, problem.depth, problem.scale, {pair(rows_of(problem.q, panel), scratch.blocks(of_key, panel))}, s, stride);
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

// p = the softmax again, from the saved statistics.
template <typename T>
void probabilities(const Problem<T>& problem, const Panel& panel, const T* statistics, const Scratch<T>& scratch, T* p) {
  scores(problem, panel, scratch, p);
  for_each_window(problem, panel, statistics, p, scratch.stride, attention_rows<T>().probabilities);
}

// The factors that dropout puts on a row of weights, 0 or 1 / (1 - p): made anew for each row, in one buffer.
template <typename T>
class DropoutFactors {
 public:
  explicit DropoutFactors(const Problem<T>& problem, const Panel& panel)
      : problem_(problem), panel_(panel), factors_(problem.dropout ? panel.columns() + 4 : 0) {}

  // Draws those of the panel's row i. Without dropout nothing is drawn, and multiply does nothing.
  void draw(int64_t i) {
    if (!problem_.dropout) return;
    const Dropout& dropout = *problem_.dropout;
    // Words come in groups of four columns; a panel begins with a block, and so with a group.
    attention_rows<T>().dropout((panel_.columns() + 3) / 4, panel_.begin / 4, panel_.first + i, panel_.head,
                                dropout.seeds[panel_.batch], dropout.threshold, T(dropout.scale), factors_.data());
  }

  void multiply(T* row) const {
    if (problem_.dropout) attention_rows<T>().multiply(panel_.columns(), factors_.data(), row);
  }

 private:
  const Problem<T>& problem_;
  const Panel& panel_;
  std::vector<T> factors_;
};

// Buffers of a panel's scores, by what the functions below leave in them.
enum { weights, gradients, tangents, tangent_gradients };

// weights = the dropped weights Z, gradients = dS.
template <typename T>
void score_gradients(const Problem<T>& problem, const Panel& panel, const T* statistics, Operand<const T> grad_out, const Scratch<T>& scratch) {
  const int64_t stride = scratch.stride;
  T *p = scratch[weights], *e = scratch[gradients];
  probabilities(problem, panel, statistics, scratch, p);
  outer(problem, panel, problem.value_depth, T(1), {pair(grad_out, scratch.blocks(of_value, panel))}, e, stride);
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
void tangent_scores(const Problem<T>& problem, const Tangents<T>& tangent, const Panel& panel, const Scratch<T>& scratch, T* t) {
  const auto with_key = pair(rows_of(tangent.q, panel), scratch.blocks(of_key, panel));
  const auto with_tangent_key = pair(rows_of(problem.q, panel), scratch.blocks(of_tangent_key, panel));
  outer(problem, panel, problem.depth, problem.scale, {with_key, with_tangent_key}, t, scratch.stride);
  if (tangent.mask) add_mask(*tangent.mask, panel, t, scratch.stride);
}

// weights = the dropped weights Z, tangents = their tangent.
template <typename T>
void tangent_weights(const Problem<T>& problem, const Tangents<T>& tangent, const Panel& panel, const T* statistics, const Scratch<T>& scratch) {
  const int64_t stride = scratch.stride;
  T *p = scratch[weights], *t = scratch[tangents];
  probabilities(problem, panel, statistics, scratch, p);
  tangent_scores(problem, tangent, panel, scratch, t);
  DropoutFactors<T> factors(problem, panel);
  for (int64_t i = 0; i < panel.count; ++i) {
    T *p_row = p + i * stride, *t_row = t + i * stride;
    attention_rows<T>().softmax_jacobian(panel.columns(), p_row, t_row);
    factors.draw(i);
    factors.multiply(p_row);
    factors.multiply(t_row);
  }
}

// weights = the dropped weights Z, tangents = their tangent, gradients = dS, tangent_gradients = the tangent of that.
template <typename T>
void tangent_score_gradients(const Problem<T>& problem, const Tangents<T>& tangent, const Panel& panel, const T* statistics,
                             Operand<const T> grad_out, const std::optional<Operand<const T>>& tangent_grad_out,
                             const Scratch<T>& scratch) {
  const int64_t dv = problem.value_depth, stride = scratch.stride;
  T *p = scratch[weights], *t = scratch[tangents], *e = scratch[gradients], *f = scratch[tangent_gradients];
  probabilities(problem, panel, statistics, scratch, p);
  tangent_scores(problem, tangent, panel, scratch, t);
  const auto value = scratch.blocks(of_value, panel);
  const auto with_tangent_value = pair(grad_out, scratch.blocks(of_tangent_value, panel));
  outer(problem, panel, dv, T(1), {pair(grad_out, value)}, e, stride);
  if (tangent_grad_out) outer(problem, panel, dv, T(1), {with_tangent_value, pair(*tangent_grad_out, value)}, f, stride);
  else outer(problem, panel, dv, T(1), {with_tangent_value}, f, stride);
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
