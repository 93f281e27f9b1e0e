// The kernels of one type of tokens and one size of pieces: compiled once for each, see
// csrc/cuda/CMakeLists.txt.
#include "cuda/launch.h"
#include "cuda/passes.h"

namespace flashmaps::cuda {

template <class T, int steps>
void Variant<T, steps>::lse(const LogSumExpArguments& a, Index3 grid, int threads, int bytes,
                            Stream stream) {
  launch("lse", lse_kernel<T, steps>, grid, threads, bytes, stream, a);
}
template <class T, int steps>
void Variant<T, steps>::statistics(const StatisticsArguments& a, Index3 grid, int threads,
                                   int bytes, Stream stream) {
  launch("statistics", statistics_kernel<T, steps>, grid, threads, bytes, stream, a);
}
template <class T, int steps>
void Variant<T, steps>::product(const ProductArguments& a, Index3 grid, int threads, int bytes,
                                Stream stream) {
  launch("product", product_kernel<T, steps>, grid, threads, bytes, stream, a);
}
template <class T, int steps>
void Variant<T, steps>::round_trip(const ReturnArguments& a, Index3 grid, int threads, int bytes,
                                   Stream stream) {
  launch("return", return_kernel<T, steps>, grid, threads, bytes, stream, a);
}

template struct Variant<FLASHMAPS_TOKEN, FLASHMAPS_STEPS>;

}  // namespace flashmaps::cuda
