// The four passes of attention on the CPU, by row panels: the double backward needs 12 matrix products. Formulas and names are
// in metafast/ops/attention/README.md.

#include "attention.h"

#include <torch/csrc/stable/library.h>

#include "cpu/attention/call.h"
#include "cpu/attention/scores.h"

namespace metafast {
namespace {

template <typename T>
void forward(const Problem<T>& problem, Matrices<T> out, T* statistics) {
  const int64_t dv = problem.value_depth;
  const std::vector<Packed<T>> keys{{&problem.k, problem.depth, in_blocks}, {&problem.v, dv, in_slices}};
  for_each_panel(problem, 1, keys, [&](const Panel& panel, const Scratch<T>& scratch) {
    T* p = scratch[weights];
    if (panel.columns() == 0) zero_rows(rows_of(out, panel), panel.count, dv);
    else scores(problem, panel, scratch, p);
    for_each_window(problem, panel, statistics, p, scratch.stride, attention_rows<T>().softmax);
    if (panel.columns() == 0) return;
    DropoutFactors<T> factors(problem, panel);
    for (int64_t i = 0; problem.dropout && i < panel.count; ++i) {
      factors.draw(i);
      factors.multiply(p + i * scratch.stride);
    }
    to_rows(problem, panel, dv, T(1), {pair(scratch.scores(weights), scratch.slices(of_value, panel))}, rows_of(out, panel));
  });
}

template <typename T>
void backward(const Problem<T>& problem, const T* statistics, Matrices<const T> grad_out, Matrices<T> grad_query, const KeySums<T>& grads) {
  const int64_t d = problem.depth, dv = problem.value_depth;
  const std::vector<Packed<T>> keys{{&problem.k, d}, {&problem.v, dv, in_blocks}};
  for_each_panel_summing(problem, grads, 2, keys, [&](const Panel& panel, const Scratch<T>& scratch, KeySum<T> grad_key, KeySum<T> grad_value) {
    if (panel.columns() == 0) return zero_rows(rows_of(grad_query, panel), panel.count, d);
    const auto g = rows_of(grad_out, panel), p = scratch.scores(weights), e = scratch.scores(gradients);
    score_gradients(problem, panel, statistics, g, scratch);
    to_keys(problem, panel, scratch, dv, T(1), {pair(p, g)}, grad_value);
    to_rows(problem, panel, d, problem.scale, {pair(e, scratch.slices(of_key, panel))}, rows_of(grad_query, panel));
    to_keys(problem, panel, scratch, d, problem.scale, {pair(e, rows_of(problem.q, panel))}, grad_key);
  });
}

template <typename T>
void jvp(const Problem<T>& problem, const T* statistics, const Tangents<T>& tangent, Matrices<T> tangent_out) {
  const int64_t d = problem.depth, dv = problem.value_depth;
  const std::vector<Packed<T>> keys{{&problem.k, d, in_blocks}, {&problem.v, dv, in_slices}, {&tangent.k, d, in_blocks}, {&tangent.v, dv, in_slices}};
  for_each_panel(problem, 3, keys, [&](const Panel& panel, const Scratch<T>& scratch) {
    if (panel.columns() == 0) return zero_rows(rows_of(tangent_out, panel), panel.count, dv);
    tangent_weights(problem, tangent, panel, statistics, scratch);
    const auto p = scratch.scores(weights), t = scratch.scores(tangents);
    to_rows(problem, panel, dv, T(1), {pair(t, scratch.slices(of_value, panel)), pair(p, scratch.slices(of_tangent_value, panel))}, rows_of(tangent_out, panel));
  });
}

template <typename T>
void backward_jvp(const Problem<T>& problem, const T* statistics, Matrices<const T> grad_out, const Tangents<T>& tangent,
                  const std::optional<Matrices<const T>>& tangent_grad_out, Matrices<T> tangent_out,
                  Matrices<T> tangent_grad_query, const KeySums<T>& tangent_grads) {
  const int64_t d = problem.depth, dv = problem.value_depth;
  const std::vector<Packed<T>> keys{{&problem.k, d}, {&problem.v, dv}, {&tangent.k, d}, {&tangent.v, dv}};
  for_each_panel_summing(problem, tangent_grads, 4, keys, [&](const Panel& panel, const Scratch<T>& scratch, KeySum<T> key_sum, KeySum<T> value_sum) {
    if (panel.columns() == 0) {
      zero_rows(rows_of(tangent_out, panel), panel.count, dv);
      zero_rows(rows_of(tangent_grad_query, panel), panel.count, d);
      return;
    }
    const auto g = rows_of(grad_out, panel);
    std::optional<Operand<const T>> tangent_g;
    if (tangent_grad_out) tangent_g = rows_of(*tangent_grad_out, panel);
    tangent_score_gradients(problem, tangent, panel, statistics, g, tangent_g, scratch);
    const auto p = scratch.scores(weights), t = scratch.scores(tangents);
    const auto e = scratch.scores(gradients), f = scratch.scores(tangent_gradients);
    to_rows(problem, panel, dv, T(1), {pair(t, scratch.slices(of_value, panel)), pair(p, scratch.slices(of_tangent_value, panel))}, rows_of(tangent_out, panel));
    to_rows(problem, panel, d, problem.scale, {pair(f, scratch.slices(of_key, panel)), pair(e, scratch.slices(of_tangent_key, panel))},
            rows_of(tangent_grad_query, panel));
    to_keys(problem, panel, scratch, d, problem.scale, {pair(f, rows_of(problem.q, panel)), pair(e, rows_of(tangent.q, panel))}, key_sum);
    if (tangent_g) to_keys(problem, panel, scratch, dv, T(1), {pair(t, g), pair(p, *tangent_g)}, value_sum);
    else to_keys(problem, panel, scratch, dv, T(1), {pair(t, g)}, value_sum);
  });
}

}  // namespace

void attention_forward_out(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& seeds, int64_t left, int64_t right, double dropout_p, double scale, const Tensor& out_,
    const Tensor& statistics_) {
  const Call call(query, key, value, attn_mask, seeds, left, right, dropout_p, scale);
  const Output out = output_with_plain_rows(out_), statistics = contiguous_output(statistics_);
  call.with_problem([&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    forward(problem, Matrices<T>(out.tensor, problem.lead), static_cast<T*>(statistics.tensor.data_ptr()));
  });
  for (const Output* output : {&out, &statistics}) output->give();
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& seeds, int64_t left, int64_t right, double dropout_p, double scale) {
  const Tensor out = output_like(query, value.size(value.dim() - 1));
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = 2;
  const ScalarType type = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor statistics = torch::stable::new_empty(query, sizes, type);
  attention_forward_out(query, key, value, attn_mask, seeds, left, right, dropout_p, scale, out, statistics);
  return {out, statistics};
}

void attention_backward_out(
    const Tensor& grad_out_, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor&,
    const Tensor& statistics_, const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds, int64_t left,
    int64_t right, double dropout_p, double scale, const Tensor& grad_query_, const Tensor& grad_key_, const Tensor& grad_value_) {
  const Call call(query, key, value, attn_mask, seeds, left, right, dropout_p, scale);
  const Tensor grad_out = rows_as_read(grad_out_), statistics = torch::stable::contiguous(statistics_);
  const Output grad_query = output_with_plain_rows(grad_query_), grad_key = output_with_plain_rows(grad_key_);
  const Output grad_value = output_with_plain_rows(grad_value_);
  call.with_problem([&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    const auto& lead = problem.lead;
    backward(problem, data<T>(statistics), Matrices<const T>(grad_out, lead), Matrices<T>(grad_query.tensor, lead),
             KeySums<T>{Matrices<T>(grad_key.tensor, lead), Matrices<T>(grad_value.tensor, lead)});
  });
  for (const Output* output : {&grad_query, &grad_key, &grad_value}) output->give();
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& statistics, const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds, int64_t left,
    int64_t right, double dropout_p, double scale) {
  const Tensor grad_query = output_like(query), grad_key = output_like(key), grad_value = output_like(value);
  attention_backward_out(grad_out, query, key, value, out, statistics, attn_mask, seeds, left, right, dropout_p, scale,
                         grad_query, grad_key, grad_value);
  return {grad_query, grad_key, grad_value};
}

void attention_jvp_out(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor&, const Tensor& statistics_,
    const Tensor& tangent_query, const Tensor& tangent_key, const Tensor& tangent_value,
    const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds,
    int64_t left, int64_t right, double dropout_p, double scale, const Tensor& tangent_out_) {
  const Call call(query, key, value, attn_mask, seeds, left, right, dropout_p, scale);
  const TangentTensors tangents(tangent_query, tangent_key, tangent_value, tangent_mask);
  const Tensor statistics = torch::stable::contiguous(statistics_);
  const Output tangent_out = output_with_plain_rows(tangent_out_);
  call.with_problem([&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    jvp(problem, data<T>(statistics), tangents.read<T>(problem), Matrices<T>(tangent_out.tensor, problem.lead));
  });
  tangent_out.give();
}

Tensor attention_jvp(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& statistics,
    const Tensor& tangent_query, const Tensor& tangent_key, const Tensor& tangent_value,
    const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds,
    int64_t left, int64_t right, double dropout_p, double scale) {
  const Tensor tangent_out = output_like(out);
  attention_jvp_out(query, key, value, out, statistics, tangent_query, tangent_key, tangent_value, tangent_mask, attn_mask, seeds,
                    left, right, dropout_p, scale, tangent_out);
  return tangent_out;
}

void attention_backward_jvp_out(
    const Tensor& grad_out_, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor&,
    const Tensor& statistics_, const Tensor& tangent_query, const Tensor& tangent_key, const Tensor& tangent_value,
    const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& tangent_grad_out_,
    const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds, int64_t left, int64_t right,
    double dropout_p, double scale, const Tensor& tangent_out_, const Tensor& tangent_grad_query_,
    const Tensor& tangent_grad_key_, const Tensor& tangent_grad_value_) {
  const Call call(query, key, value, attn_mask, seeds, left, right, dropout_p, scale);
  const TangentTensors tangents(tangent_query, tangent_key, tangent_value, tangent_mask);
  const Tensor grad_out = rows_as_read(grad_out_), statistics = torch::stable::contiguous(statistics_);
  const std::optional<Tensor> tangent_grad_out = rows_as_read(tangent_grad_out_);
  const Output tangent_out = output_with_plain_rows(tangent_out_), tangent_grad_query = output_with_plain_rows(tangent_grad_query_);
  const Output tangent_grad_key = output_with_plain_rows(tangent_grad_key_), tangent_grad_value = output_with_plain_rows(tangent_grad_value_);
  call.with_problem([&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    const auto& lead = problem.lead;
    std::optional<Matrices<const T>> tangent_g;
    if (tangent_grad_out) tangent_g.emplace(*tangent_grad_out, lead);
    backward_jvp(problem, data<T>(statistics), Matrices<const T>(grad_out, lead), tangents.read<T>(problem), tangent_g,
                 Matrices<T>(tangent_out.tensor, lead), Matrices<T>(tangent_grad_query.tensor, lead),
                 KeySums<T>{Matrices<T>(tangent_grad_key.tensor, lead), Matrices<T>(tangent_grad_value.tensor, lead)});
  });
  for (const Output* output : {&tangent_out, &tangent_grad_query, &tangent_grad_key, &tangent_grad_value}) output->give();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_jvp(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& statistics, const Tensor& tangent_query, const Tensor& tangent_key, const Tensor& tangent_value,
    const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& tangent_grad_out,
    const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds, int64_t left, int64_t right,
    double dropout_p, double scale) {
  const Tensor tangent_out = output_like(out), tangent_grad_query = output_like(query);
  const Tensor tangent_grad_key = output_like(key), tangent_grad_value = output_like(value);
  attention_backward_jvp_out(grad_out, query, key, value, out, statistics, tangent_query, tangent_key, tangent_value, tangent_mask,
                             tangent_grad_out, attn_mask, seeds, left, right, dropout_p, scale, tangent_out, tangent_grad_query,
                             tangent_grad_key, tangent_grad_value);
  return {tangent_out, tangent_grad_query, tangent_grad_key, tangent_grad_value};
}

}  // namespace metafast

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&metafast::attention_forward));
  library.impl("attention_forward.out", TORCH_BOX(&metafast::attention_forward_out));
  library.impl("attention_backward", TORCH_BOX(&metafast::attention_backward));
  library.impl("attention_backward.out", TORCH_BOX(&metafast::attention_backward_out));
  library.impl("attention_jvp", TORCH_BOX(&metafast::attention_jvp));
  library.impl("attention_jvp.out", TORCH_BOX(&metafast::attention_jvp_out));
  library.impl("attention_backward_jvp", TORCH_BOX(&metafast::attention_backward_jvp));
  library.impl("attention_backward_jvp.out", TORCH_BOX(&metafast::attention_backward_jvp_out));
}
