// Bindings of a transformer's layers (dense.h, pointwise.h). Tensors come as addresses, which fastppo/models/layers.py has
// checked: there are thousands of calls in a step, of some microseconds each, and an exchange by DLPack takes as long.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "bindings.h"
#include "dense.h"
#include "pointwise.h"

namespace nb = nanobind;

namespace fastppo {
namespace {

using Address = std::uintptr_t;  // 0: there is none
using MatrixArgs = std::tuple<Address, bool, std::int64_t, std::int64_t>;  // bfloat16 or float32; rows, columns
using LayerArgs = std::tuple<MatrixArgs, Address, Address, Address, Address>;  // weight, bias, y, ∂weight, ∂bias
using Settings = std::tuple<int, std::optional<std::string>>;  // threads, instruction set

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Matrix matrix_at(const MatrixArgs& args) {
    const auto& [address, half, rows, cols] = args;
    return {at<const void>(address), half ? Type::bfloat16 : Type::float32, rows, cols, cols};
}

Dense dense(const MatrixArgs& x, const std::vector<LayerArgs>& layers, Address d_x, const Settings& settings) {
    Dense d;
    d.x = matrix_at(x);
    for (const auto& [weight, bias, y, d_weight, d_bias] : layers) {
        const Matrix w = matrix_at(weight);
        d.layers.push_back({w, at<const float>(bias), {at<const void>(y), Type::bfloat16, d.x.rows, w.rows, w.rows},
                            at<void>(d_weight), at<float>(d_bias)});
    }
    d.d_x = d.x;
    d.d_x.data = at<const void>(d_x);
    d.threads = std::get<0>(settings);
    d.isa = parse_isa(std::get<1>(settings));
    d.products = products();
    if (d.products.bfloat16 == nullptr) throw nb::value_error("no products in bfloat16: call use_products first");
    return d;
}

void forward(const MatrixArgs& x, const std::vector<LayerArgs>& layers, const Settings& settings) {
    const Dense d = dense(x, layers, 0, settings);
    nb::gil_scoped_release released;
    dense_forward(d);
}

void backward(const MatrixArgs& x, const std::vector<LayerArgs>& layers, Address d_x, const Settings& settings) {
    const Dense d = dense(x, layers, d_x, settings);
    nb::gil_scoped_release released;
    dense_backward(d);
}

void norm(Address x, Address weight, float eps, std::int64_t rows, std::int64_t n, Address y, Address scales,
          const Settings& settings) {
    const Isa isa = parse_isa(std::get<1>(settings));
    nb::gil_scoped_release released;
    rms_norm(at<const float>(x), at<const float>(weight), eps, rows, n, isa, std::get<0>(settings), at<float>(y),
             at<float>(scales));
}

void norm_backward(Address x, Address weight, Address scales, Address d_y, std::int64_t rows, std::int64_t n,
                   Address d_x, Address d_weight, const Settings& settings) {
    const Isa isa = parse_isa(std::get<1>(settings));
    nb::gil_scoped_release released;
    rms_norm_backward(at<const float>(x), at<const float>(weight), at<const float>(scales), at<const float>(d_y), rows,
                      n, isa, std::get<0>(settings), at<float>(d_x), at<float>(d_weight));
}

using Half = std::uint16_t;

void gate(Address gate, Address up, std::int64_t n, Address h, const Settings& settings) {
    const Isa isa = parse_isa(std::get<1>(settings));
    nb::gil_scoped_release released;
    gated(at<const Half>(gate), at<const Half>(up), n, isa, std::get<0>(settings), at<Half>(h));
}

void gate_backward(Address gate, Address up, Address d_h, std::int64_t n, Address d_gate, Address d_up,
                   const Settings& settings) {
    const Isa isa = parse_isa(std::get<1>(settings));
    nb::gil_scoped_release released;
    gated_backward(at<const Half>(gate), at<const Half>(up), at<const Half>(d_h), n, isa, std::get<0>(settings),
                   at<Half>(d_gate), at<Half>(d_up));
}

}  // namespace

void bind_layers(nb::module_& m) {
    using namespace nb::literals;
    m.def("dense_forward", &forward, "x"_a, "layers"_a, "settings"_a);
    m.def("dense_backward", &backward, "x"_a, "layers"_a, "d_x"_a, "settings"_a);
    m.def("rms_norm", &norm, "x"_a, "weight"_a, "eps"_a, "rows"_a, "n"_a, "y"_a, "scales"_a, "settings"_a);
    m.def("rms_norm_backward", &norm_backward, "x"_a, "weight"_a, "scales"_a, "d_y"_a, "rows"_a, "n"_a, "d_x"_a,
          "d_weight"_a, "settings"_a);
    m.def("gated", &gate, "gate"_a, "up"_a, "n"_a, "h"_a, "settings"_a);
    m.def("gated_backward", &gate_backward, "gate"_a, "up"_a, "d_h"_a, "n"_a, "d_gate"_a, "d_up"_a, "settings"_a);
}

}  // namespace fastppo
