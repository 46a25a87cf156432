// Included once for each element type and instruction set by gelu.cpp; see both_types.inl.

namespace CAPABILITY_NAMESPACE {

#include "cpu/isa/exp.inl"

// Double precision is for checking and takes the library's; in single precision a rational function (Eigen's, within a few
// units in the last place) is vectorised.
inline double error_function(double x) { return std::erf(x); }
inline float error_function(float x) {
  x = x < -4.f ? -4.f : x > 4.f ? 4.f : x;
  const float s = x * x;
  const float above = x * (-1.60960333262415e-02f + s * (-2.95459980854025e-03f + s * (-7.34990630326855e-04f + s * (
      -5.69250639462346e-05f + s * (-2.10102402082508e-06f + s * (2.77068142495902e-08f + s * -2.72614225801306e-10f))))));
  const float below = -1.42647390514189e-02f + s * (-7.37332916720468e-03f + s * (-1.68282697438203e-03f + s * (
      -2.13374055278905e-04f + s * -1.45660718464996e-05f)));
  return above / below;
}

// Where the density is 0 to any precision the square may be infinite.
inline REAL bounded_square(REAL x) { return x * x < REAL(1e8) ? x * x : REAL(1e8); }

inline REAL density_at(REAL square) { return exp_nonpositive(REAL(-0.5) * square) * REAL(0.3989422804014326779); }

inline REAL first_derivative(REAL x, REAL density) {
  return REAL(0.5) + REAL(0.5) * error_function(x * REAL(0.7071067811865475244)) + x * density;
}

void backward(int64_t n, const REAL* __restrict grad, const REAL* __restrict x, REAL* __restrict by_x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) by_x[i] = grad[i] * first_derivative(x[i], density_at(bounded_square(x[i])));
}

void double_backward(int64_t n, const REAL* __restrict grad, const REAL* __restrict x, const REAL* __restrict tangent,
                     REAL* __restrict by_grad, REAL* __restrict by_x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const REAL square = bounded_square(x[i]), density = density_at(square);
    by_grad[i] = tangent[i] * first_derivative(x[i], density);
    by_x[i] = tangent[i] * grad[i] * density * (REAL(2) - square);
  }
}

const GeluRows<REAL> table{backward, double_backward};

}  // namespace CAPABILITY_NAMESPACE
