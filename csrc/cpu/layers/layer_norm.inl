// Included once for each element type and instruction set by layer_norm.cpp; see both_types.inl. A row is short and stays in
// the first-level cache over the few loops that each function makes over it.

namespace CAPABILITY_NAMESPACE {

void forward(int64_t n, const REAL* __restrict x, const REAL* __restrict weight, const REAL* __restrict bias, REAL eps,
             REAL* __restrict out, REAL* __restrict statistics) {
  REAL sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j];
  const REAL mean = sum / REAL(n);
  REAL squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < n; ++j) squares += (x[j] - mean) * (x[j] - mean);
  const REAL rstd = REAL(1) / std::sqrt(squares / REAL(n) + eps);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = (x[j] - mean) * rstd * weight[j] + bias[j];
  statistics[0] = mean;
  statistics[1] = rstd;
}

void backward(int64_t n, const REAL* __restrict grad, const REAL* __restrict x, const REAL* __restrict weight,
              const REAL* __restrict statistics, REAL* __restrict grad_x, REAL* __restrict grad_weight, REAL* __restrict grad_bias) {
  const REAL mean = statistics[0], rstd = statistics[1];
  REAL s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
  for (int64_t j = 0; j < n; ++j) {
    const REAL normal = (x[j] - mean) * rstd, weighted = grad[j] * weight[j];
    s1 += weighted;
    s2 += weighted * normal;
  }
  s1 /= REAL(n);
  s2 /= REAL(n);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const REAL normal = (x[j] - mean) * rstd;
    grad_x[j] = rstd * (grad[j] * weight[j] - s1 - normal * s2);
    grad_weight[j] += grad[j] * normal;
    grad_bias[j] += grad[j];
  }
}

void backward_jvp(int64_t n, const REAL* __restrict grad, const REAL* __restrict x, const REAL* __restrict weight,
                  const REAL* __restrict statistics, const REAL* __restrict tangent_x, const REAL* __restrict tangent_weight,
                  const REAL* __restrict tangent_bias, REAL* __restrict tangent_out, REAL* __restrict tangent_grad_x,
                  REAL* __restrict tangent_grad_weight) {
  const REAL mean = statistics[0], rstd = statistics[1];
  REAL a1 = 0, a2 = 0, s1 = 0, s2 = 0, u1 = 0, u2 = 0;
#pragma omp simd reduction(+ : a1, a2, s1, s2, u1, u2)
  for (int64_t j = 0; j < n; ++j) {
    const REAL normal = (x[j] - mean) * rstd, weighted = grad[j] * weight[j], tangent_weighted = grad[j] * tangent_weight[j];
    a1 += tangent_x[j];
    a2 += tangent_x[j] * normal;
    s1 += weighted;
    s2 += weighted * normal;
    u1 += tangent_weighted;
    u2 += tangent_weighted * normal;
  }
  const REAL count = REAL(n);
  a1 /= count;
  a2 /= count;
  s1 /= count;
  s2 /= count;
  u1 /= count;
  u2 /= count;
  REAL cross = 0;
#pragma omp simd reduction(+ : cross)
  for (int64_t j = 0; j < n; ++j) {
    const REAL normal = (x[j] - mean) * rstd, tangent_normal = rstd * (tangent_x[j] - a1 - normal * a2);
    cross += grad[j] * weight[j] * tangent_normal;
    tangent_out[j] = tangent_normal * weight[j] + normal * tangent_weight[j] + tangent_bias[j];
    tangent_grad_weight[j] += grad[j] * tangent_normal;
  }
  u2 += cross / count;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const REAL normal = (x[j] - mean) * rstd, tangent_normal = rstd * (tangent_x[j] - a1 - normal * a2);
    // The tangent of rstd is -rstd^2 a2.
    const REAL grad_x = rstd * (grad[j] * weight[j] - s1 - normal * s2);
    tangent_grad_x[j] = rstd * (grad[j] * tangent_weight[j] - u1 - tangent_normal * s2 - normal * u2) - rstd * a2 * grad_x;
  }
}

const LayerNormRows<REAL> table{forward, backward, backward_jvp};

}  // namespace CAPABILITY_NAMESPACE
