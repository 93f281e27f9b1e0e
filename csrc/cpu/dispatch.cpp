#include "cpu/dispatch.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if defined(FLASHMAPS_HAVE_AVX512) && defined(__x86_64__) && defined(__linux__)
#define FLASHMAPS_HAVE_AMX 1
// Whether there is the unit, with products of bfloat16, and Linux lets this process use it.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  if ((d & kBFloat16) == 0 || (d & kTiles) == 0) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// The AVX-512 build with the matrix unit for half precision.
Cost amx_reduce(const Problem& problem, const Operands& operands, const Outputs& outputs,
                const Limits& limits) {
  Limits more = limits;
  more.matrix_unit = true;
  return avx512::reduce(problem, operands, outputs, more);
}
#endif

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
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#ifdef FLASHMAPS_HAVE_AMX
  all.push_back({"amx", &amx_reduce, &avx512::backward, avx512 && has_amx()});
#endif
  all.push_back({"avx512", &avx512::reduce, &avx512::backward, avx512});
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
