// Bindings of what the kernels take from PyTorch, and of the matrices it hands them.
#include "bindings/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "runtime/parallel.h"

namespace nb = nanobind;

namespace fastppo {
namespace {

Products usable;

Type type_of(nb::dlpack::dtype t) {
    if (t == nb::dtype<float>()) return Type::float32;
    if (t.lanes == 1 && t.bits == 16) {
        if (t.code == std::uint8_t(nb::dlpack::dtype_code::Bfloat)) return Type::bfloat16;
        if (t.code == std::uint8_t(nb::dlpack::dtype_code::Float)) return Type::float16;
    }
    throw nb::type_error("expected float32, bfloat16 or float16");
}

// A [2, 64] B [64, 64] with entries whose sums are exact in every type: does it come out right, twice added?
bool multiplies(Products::Multiply multiply, Type type) {
    constexpr int m = 2, n = kPanel, k = kPanel;
    const bool low = type == Type::bfloat16;
    std::vector<float> a(m * k), b(k * n), c(m * n);
    for (int i = 0; i < m * k; ++i) a[i] = float(i % 5 - 2);
    for (int i = 0; i < k * n; ++i) b[i] = float(i % 7 - 3);
    std::vector<std::uint16_t> a16(a.size()), b16(b.size());
    const RowKernels& kernels = row_kernels(Isa::portable);
    kernels.convert(a.data(), Type::float32, m * k, a16.data(), Type::bfloat16, m * k);
    for (int i = 0; i < k; ++i) {
        for (int j = 0; j < n; ++j) {
            kernels.convert(&b[i * n + j], Type::float32, 1, &b16[(i / 2 * n + j) * 2 + i % 2], Type::bfloat16, 1);
        }
    }
    try {
        for (const bool add : {false, true}) {
            multiply(m, n, k, k, n, n, add, low ? static_cast<void*>(a16.data()) : a.data(),
                     low ? static_cast<void*>(b16.data()) : b.data(), c.data(), low);
        }
        usable.release(low);
    } catch (...) {
        return false;  // PyTorch's way of saying that the machine has no such product
    }
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
            float sum = 0;
            for (int l = 0; l < k; ++l) sum += a[i * k + l] * b[l * n + j];
            if (c[i * n + j] != 2 * sum) return false;
        }
    }
    return true;
}

std::vector<std::string> use_products(std::uintptr_t float32, std::uintptr_t bfloat16, std::uintptr_t release) {
    usable = {};
    usable.release = reinterpret_cast<void (*)(bool)>(release);
    std::vector<std::string> names;
    const auto single = reinterpret_cast<Products::Multiply>(float32);
    const auto half = reinterpret_cast<Products::Multiply>(bfloat16);
    if (multiplies(single, Type::float32)) {
        usable.float32 = single;
        names.emplace_back("float32");
    }
    // Without instructions for bfloat16 the float32 product is the faster one.
    if (supports(Isa::avx512_bf16) && multiplies(half, Type::bfloat16)) {
        usable.bfloat16 = half;
        names.emplace_back("bfloat16");
    }
    return names;
}

}  // namespace

Matrix matrix(const Any& a) {
    if (a.ndim() != 2 || (a.shape(1) > 1 && a.stride(1) != 1)) throw nb::value_error("expected a matrix of whole rows");
    return {a.data(), type_of(a.dtype()), std::int64_t(a.shape(0)), std::int64_t(a.shape(1)), a.stride(0)};
}

const Products& products() { return usable; }

void bind_products(nb::module_& m) {
    using namespace nb::literals;
    m.def("use_products", &use_products, "float32"_a, "bfloat16"_a, "release"_a,
          "Takes the addresses of PyTorch's microkernels (products.h), tries them, and names the types that work.");
    m.def("use_team", [](std::uintptr_t team) { use_team(reinterpret_cast<Team>(team)); }, "team"_a,
          "Takes the address of GOMP_parallel (parallel.h); 0 for threads of the extension's own.");
}

}  // namespace fastppo
