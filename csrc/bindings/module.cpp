// fastppo._C: the kernels for Python. Buffers come in through DLPack, so no header of PyTorch is needed and one build
// fits every version of it. Shapes, values and offsets are checked by the callers in fastppo/ops.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "runtime/cpu.h"
#include "gae/gae.h"

namespace nb = nanobind;

namespace {

using fastppo::Flat;
using fastppo::Isa;
using fastppo::parse_isa;

constexpr std::pair<Isa, const char*> kIsas[] = {
    {Isa::avx512_bf16, "avx512_bf16"},
    {Isa::avx512, "avx512"},
    {Isa::avx2, "avx2"},
    {Isa::portable, "portable"}};  // fastest first

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto& [isa, name] : kIsas) {
        if (fastppo::supports(isa)) names.emplace_back(name);
    }
    return names;
}

template <typename T>
T* data(const std::optional<Flat<T>>& array) {
    return array ? array->data() : nullptr;
}

template <typename T>
bool gae(const Flat<const T>& rewards, const Flat<const T>& values, const Flat<T>& advantages, const Flat<T>& returns,
         const Flat<const std::int64_t>& offsets, double gamma, double lam, const std::optional<Flat<const bool>>& mask,
         const std::optional<Flat<const bool>>& dones, const std::optional<Flat<const T>>& bootstrap, int threads,
         const std::optional<std::string>& isa) {
    const fastppo::GaeArgs<T> args{rewards.data(), values.data(),    data(mask),
                                   data(dones),    data(bootstrap),  offsets.data(),
                                   std::int64_t(offsets.size()) - 1, gamma,
                                   lam,            advantages.data(), returns.data()};
    const Isa chosen = parse_isa(isa);
    nb::gil_scoped_release released;
    return fastppo::gae(args, chosen, threads);
}

template <typename T>
void bind_gae(nb::module_& m) {
    using namespace nb::literals;
    m.def("gae", &gae<T>, "rewards"_a.noconvert(), "values"_a.noconvert(), "advantages"_a.noconvert(),
          "returns"_a.noconvert(), "offsets"_a.noconvert(), "gamma"_a, "lam"_a, "mask"_a.noconvert() = nb::none(),
          "dones"_a.noconvert() = nb::none(), "bootstrap"_a.noconvert() = nb::none(), "threads"_a = 1,
          "isa"_a = nb::none(), "Writes advantages and returns; False if a real token's advantage is not finite.");
}

}  // namespace

Isa fastppo::parse_isa(const std::optional<std::string>& wanted) {
    for (const auto& [isa, name] : kIsas) {
        if (fastppo::supports(isa) && (!wanted || *wanted == name)) return isa;
    }
    throw nb::value_error("isa: not one of instruction_sets()");
}

NB_MODULE(_C, m) {
    m.doc() = "fastppo's kernels for the CPU.";
    m.def("instruction_sets", &instruction_sets, "Those of this build that this machine has, fastest first.");
    bind_gae<float>(m);
    bind_gae<double>(m);
    fastppo::bind_products(m);
    fastppo::bind_linear(m);
}
