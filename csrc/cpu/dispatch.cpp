#include "cpu/dispatch.h"

namespace flashmaps {

#define FLASHMAPS_DECLARE(isa)                                                     \
  namespace isa {                                                                  \
  Cost reduce(const Problem&, const Operands&, const Outputs&, const Limits&);     \
  Cost backward(const Problem&, const Gradient&, const Gradients&, const Limits&); \
  }
#ifdef FLASHMAPS_HAVE_AVX512
FLASHMAPS_DECLARE(avx512)
#endif
#ifdef FLASHMAPS_HAVE_AVX2
FLASHMAPS_DECLARE(avx2)
#endif
FLASHMAPS_DECLARE(baseline)
#undef FLASHMAPS_DECLARE

namespace {

struct Build {
  const char* name;
  Reduce reduce;
  Backward backward;
  bool runs;
};

std::vector<Build> builds() {
  std::vector<Build> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#ifdef FLASHMAPS_HAVE_AVX512
  all.push_back({"avx512", &avx512::reduce, &avx512::backward,
                 __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")});
#endif
#ifdef FLASHMAPS_HAVE_AVX2
  all.push_back({"avx2", &avx2::reduce, &avx2::backward,
                 __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
  all.push_back({"baseline", &baseline::reduce, &baseline::backward, true});
  return all;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Build& build : builds()) {
    if (build.runs) names.emplace_back(build.name);
  }
  return names;
}

namespace {

const Build* find(const std::string& name) {
  static const std::vector<Build> all = builds();
  for (const Build& build : all) {
    if (build.runs && (name.empty() || name == build.name)) return &build;
  }
  return nullptr;
}

}  // namespace

Reduce find_reduce(const std::string& name) {
  const Build* build = find(name);
  return build == nullptr ? nullptr : build->reduce;
}

Backward find_backward(const std::string& name) {
  const Build* build = find(name);
  return build == nullptr ? nullptr : build->backward;
}

}  // namespace flashmaps
