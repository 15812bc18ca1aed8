// Bindings of the passes over a vocabulary (head/linear.h). fastppo/ops checks the arguments.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <vector>

#include "bindings/bindings.h"
#include "head/linear.h"
#include "runtime/scratch.h"

namespace nb = nanobind;

namespace fastppo {
namespace {

using Bytes = Flat<std::uint8_t>;
using ModelArgs = std::tuple<Any, Any, std::optional<Flat<const float>>>;  // hidden, weight, bias
using TransformArgs = std::tuple<float, float, float>;
// ∂W's memory, bytes from slot to slot and slots in it; spare memory and slots in it; rows; anchors; whole
using KeptArgs = std::tuple<Bytes, std::int64_t, std::int64_t, Bytes, std::int64_t, std::int64_t, Flat<float>, Bytes>;

Type parse_type(const std::string& name) {
    if (name == "float32") return Type::float32;
    if (name == "bfloat16") return Type::bfloat16;
    if (name == "float16") return Type::float16;
    throw nb::value_error("expected float32, bfloat16 or float16");
}

Divergence parse_divergence(const std::string& name) {
    if (name.empty()) return Divergence::none;
    if (name == "reverse") return Divergence::reverse;
    if (name == "forward") return Divergence::forward;
    throw nb::value_error("expected reverse, forward or nothing");
}

Model model(const ModelArgs& args) {
    const auto& bias = std::get<2>(args);
    return {matrix(std::get<0>(args)), matrix(std::get<1>(args)), bias ? bias->data() : nullptr};
}

Transform transform(const TransformArgs& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

Kept kept_of(const std::optional<KeptArgs>& args) {
    Kept kept;
    if (!args) return kept;
    const auto& [front, stride, front_tiles, back, back_tiles, rows, anchors, whole] = *args;
    kept.front = reinterpret_cast<char*>(front.data());
    kept.front_stride = stride;
    kept.front_tiles = front_tiles;
    kept.back = reinterpret_cast<char*>(back.data());
    kept.back_tiles = back_tiles;
    kept.rows = rows;
    kept.anchors = anchors.data();
    kept.whole = whole.data();
    return kept;
}

using OptionArgs = std::tuple<std::string, std::string, std::string, std::int64_t, std::int64_t, std::int64_t,
                              int, std::optional<std::string>>;

Problem problem(const ModelArgs& policy, const std::optional<ModelArgs>& reference, const TransformArgs& t,
                const Flat<const std::int64_t>& rows, const Flat<const std::int64_t>& targets,
                const OptionArgs& options) {
    Problem p;
    p.policy = model(policy);
    if (reference) p.reference = model(*reference);
    p.transform = transform(t);
    p.rows = rows.data();
    p.n = std::int64_t(rows.size());
    p.targets = targets.data();
    const auto& [divergence, operand, compute, width, block, scratch, threads, isa] = options;
    p.divergence = parse_divergence(divergence);
    p.operand = parse_type(operand);
    p.compute = parse_type(compute);
    p.width = width;
    p.block = block;
    p.scratch = scratch;
    p.threads = threads;
    p.isa = parse_isa(isa);
    p.products = products();
    if ((p.compute == Type::bfloat16 ? p.products.bfloat16 : p.products.float32) == nullptr) {
        throw nb::value_error("no products in this type: call use_products first");
    }
    return p;
}

void statistics(const ModelArgs& policy, const std::optional<ModelArgs>& reference, const TransformArgs& t,
                const Flat<const std::int64_t>& rows, const Flat<const std::int64_t>& targets,
                const OptionArgs& options, const std::optional<KeptArgs>& kept,
                const nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>& out) {
    const Problem p = problem(policy, reference, t, rows, targets, options);
    const Kept k = kept_of(kept);
    nb::gil_scoped_release released;
    linear_statistics(p, k, out.data(), std::int64_t(out.shape(1)));
}

void gradients(const ModelArgs& policy, const std::optional<ModelArgs>& reference, const TransformArgs& t,
               const Flat<const std::int64_t>& rows, const Flat<const std::int64_t>& targets,
               const OptionArgs& options, const std::optional<KeptArgs>& kept,
               const std::optional<Flat<const std::int64_t>>& kept_rows,
               const nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>& scalars,
               const std::optional<Flat<float>>& d_hidden, const std::optional<Any>& d_weight,
               const std::optional<Flat<float>>& d_bias) {
    const Problem p = problem(policy, reference, t, rows, targets, options);
    Kept k = kept_of(kept);
    k.row_of = kept_rows ? kept_rows->data() : nullptr;
    const Gradients g{scalars.data(), d_hidden ? d_hidden->data() : nullptr, d_weight ? d_weight->data() : nullptr,
                      d_bias ? d_bias->data() : nullptr};
    nb::gil_scoped_release released;
    linear_gradients(p, k, g);
}

void of_logits(const Any& logits, const TransformArgs& t, const Flat<const std::int64_t>& rows,
               const Flat<const std::int64_t>& targets,
               const nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>& out, int threads,
               const std::optional<std::string>& isa) {
    const Matrix z = matrix(logits);
    const Isa chosen = parse_isa(isa);
    nb::gil_scoped_release released;
    selective_statistics(z, rows.data(), std::int64_t(rows.size()), targets.data(), transform(t), chosen, threads,
                         out.data(), std::int64_t(out.shape(1)));
}

void gradients_of_logits(const Any& logits, const TransformArgs& t, const Flat<const std::int64_t>& rows,
                         const Flat<const std::int64_t>& targets,
                         const nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>& scalars,
                         const Any& out, int threads, const std::optional<std::string>& isa) {
    const Matrix z = matrix(logits);
    const Isa chosen = parse_isa(isa);
    nb::gil_scoped_release released;
    selective_gradients(z, rows.data(), std::int64_t(rows.size()), targets.data(), transform(t), chosen, threads,
                        scalars.data(), out.data());
}

void vector_math(const std::string& function, const Flat<const float>& x, const Flat<float>& y,
                 const std::optional<std::string>& isa) {
    const RowKernels& k = row_kernels(parse_isa(isa));
    (function == "exp" ? k.exp : k.tanh)(x.data(), std::int64_t(x.size()), y.data());
}

}  // namespace

void bind_linear(nb::module_& m) {
    using namespace nb::literals;
    m.def("linear_statistics", &statistics, "policy"_a, "reference"_a.none(), "transform"_a, "rows"_a, "targets"_a,
          "options"_a, "kept"_a.none(), "out"_a.noconvert());
    m.def("linear_gradients", &gradients, "policy"_a, "reference"_a.none(), "transform"_a, "rows"_a, "targets"_a,
          "options"_a, "kept"_a.none(), "kept_rows"_a.none(), "scalars"_a.noconvert(), "d_hidden"_a.noconvert().none(),
          "d_weight"_a.none(), "d_bias"_a.noconvert().none());
    m.def("selective_statistics", &of_logits, "logits"_a, "transform"_a, "rows"_a, "targets"_a, "out"_a.noconvert(),
          "threads"_a, "isa"_a = nb::none());
    m.def("selective_gradients", &gradients_of_logits, "logits"_a, "transform"_a, "rows"_a, "targets"_a,
          "scalars"_a.noconvert(), "out"_a, "threads"_a, "isa"_a = nb::none());
    m.def("held_scratch", &Scratch::held, "Bytes of scratch that wait for the next call.");
    m.def("free_held_scratch", &Scratch::free_held);
    m.def("vector_math", &vector_math, "function"_a, "x"_a.noconvert(), "y"_a.noconvert(), "isa"_a = nb::none());
}

}  // namespace fastppo
