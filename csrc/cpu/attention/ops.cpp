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

// An output for the statistics of the rows of a query.
Tensor statistics_of(const Tensor& query) {
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = 2;
  return torch::stable::new_empty(query, sizes, query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

}  // namespace

Results<2> attention_forward(
    const Given<2>& given, const Options& options, const Tensor& query, const Tensor& key, const Tensor& value) {
  Results<2> results = given ? *given : Results<2>{output_like(query, value.size(value.dim() - 1)), statistics_of(query)};
  const Call call(query, key, value, options);
  const Output out = output_with_plain_rows(results[0]), statistics = contiguous_output(results[1]);
  call.with_problem([&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    forward(problem, Matrices<T>(out.tensor, problem.lead), static_cast<T*>(statistics.tensor.data_ptr()));
  });
  for (const Output* output : {&out, &statistics}) output->give();
  return results;
}

Results<3> attention_backward(
    const Given<3>& given, const Options& options, const Tensor& grad_out_, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor&, const Tensor& statistics_) {
  Results<3> results = given ? *given : Results<3>{output_like(query), output_like(key), output_like(value)};
  const Call call(query, key, value, options);
  const Tensor grad_out = rows_as_read(grad_out_), statistics = torch::stable::contiguous(statistics_);
  const Output grad_query = output_with_plain_rows(results[0]), grad_key = output_with_plain_rows(results[1]);
  const Output grad_value = output_with_plain_rows(results[2]);
  call.with_problem([&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    const auto& lead = problem.lead;
    backward(problem, data<T>(statistics), Matrices<const T>(grad_out, lead), Matrices<T>(grad_query.tensor, lead),
             KeySums<T>{Matrices<T>(grad_key.tensor, lead), Matrices<T>(grad_value.tensor, lead)});
  });
  for (const Output* output : {&grad_query, &grad_key, &grad_value}) output->give();
  return results;
}

Results<1> attention_jvp(
    const Given<1>& given, const Options& options, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& statistics_, const Tensor& tangent_query, const Tensor& tangent_key,
    const Tensor& tangent_value, const std::optional<Tensor>& tangent_mask) {
  Results<1> results = given ? *given : Results<1>{output_like(out)};
  const Call call(query, key, value, options);
  const TangentTensors tangents(tangent_query, tangent_key, tangent_value, tangent_mask);
  const Tensor statistics = torch::stable::contiguous(statistics_);
  const Output tangent_out = output_with_plain_rows(results[0]);
  call.with_problem([&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    jvp(problem, data<T>(statistics), tangents.read<T>(problem), Matrices<T>(tangent_out.tensor, problem.lead));
  });
  tangent_out.give();
  return results;
}

Results<4> attention_backward_jvp(
    const Given<4>& given, const Options& options, const Tensor& grad_out_, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& statistics_, const Tensor& tangent_query, const Tensor& tangent_key,
    const Tensor& tangent_value, const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& tangent_grad_out_) {
  Results<4> results = given ? *given : Results<4>{output_like(out), output_like(query), output_like(key), output_like(value)};
  const Call call(query, key, value, options);
  const TangentTensors tangents(tangent_query, tangent_key, tangent_value, tangent_mask);
  const Tensor grad_out = rows_as_read(grad_out_), statistics = torch::stable::contiguous(statistics_);
  const std::optional<Tensor> tangent_grad_out = rows_as_read(tangent_grad_out_);
  const Output tangent_out = output_with_plain_rows(results[0]), tangent_grad_query = output_with_plain_rows(results[1]);
  const Output tangent_grad_key = output_with_plain_rows(results[2]), tangent_grad_value = output_with_plain_rows(results[3]);
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
  return results;
}

}  // namespace metafast

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, library) {
  using namespace metafast;
  library.impl("attention_forward", TORCH_BOX(&Forms<&attention_forward>::made));
  library.impl("attention_forward.out", TORCH_BOX(Forms<&attention_forward>::out));
  library.impl("attention_backward", TORCH_BOX(&Forms<&attention_backward>::made));
  library.impl("attention_backward.out", TORCH_BOX(Forms<&attention_backward>::out));
  library.impl("attention_jvp", TORCH_BOX(&Forms<&attention_jvp>::made));
  library.impl("attention_jvp.out", TORCH_BOX(Forms<&attention_jvp>::out));
  library.impl("attention_backward_jvp", TORCH_BOX(&Forms<&attention_backward_jvp>::made));
  library.impl("attention_backward_jvp.out", TORCH_BOX(Forms<&attention_backward_jvp>::out));
}
