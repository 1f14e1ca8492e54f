// Runs one kernel a number of times, for a tool that counts the instructions of the whole process: twice as
// many runs have what one run takes more, and what start-up takes cancels.
//
//     calls                            one line for each call: its name, and the elements that one run takes
//     calls ISA INT8_ISA NAME TIMES
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "sparsam/forms.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/masks.hpp"
#include "sparsam/matmul.hpp"
#include "sparsam/selection.hpp"
#include "sparsam/threads.hpp"
#include "table.hpp"

namespace {

using namespace sparsam;

constexpr std::size_t kElements = std::size_t{1} << 16;
constexpr std::size_t kRows = 256, kCols = 512;

// The same numbers on every machine, uniform in (-1, 1): splitmix64's mixing function of i.
std::uint64_t mixed(std::uint64_t i) {
  i = (i + 1) * 0x9e3779b97f4a7c15;
  i = (i ^ i >> 30) * 0xbf58476d1ce4e5b9;
  i = (i ^ i >> 27) * 0x94d049bb133111eb;
  return i ^ i >> 31;
}
double uniform(std::uint64_t i) { return static_cast<double>(static_cast<std::int64_t>(mixed(i))) * 0x1p-63; }

template <class Bits>
Bits bits_of(double x) {
  if constexpr (sizeof(Bits) == 8)
    return bit_cast<std::uint64_t>(x);
  else if constexpr (sizeof(Bits) == 4)
    return bit_cast<std::uint32_t>(static_cast<float>(x));
  else
    return static_cast<std::uint16_t>(bit_cast<std::uint32_t>(static_cast<float>(x)) >> 16);
}

struct Call {
  std::string name;
  std::size_t elements;
  std::function<std::function<void()>()> prepare;  // gives what is run
};

template <class Bits>
void add_selection(std::vector<Call>& calls, const std::string& type) {
  const auto data = [] {
    std::vector<Bits> all(kElements);
    for (std::size_t i = 0; i < kElements; ++i) all[i] = bits_of<Bits>(uniform(i));
    return all;
  };
  const auto add = [&](const char* name, auto run) {
    calls.push_back({std::string(name) + " " + type, kElements, [=] {
                       std::vector<std::uint64_t> words(kElements / 64);
                       for (std::size_t i = 0; i < words.size(); ++i) words[i] = mixed(i);
                       return std::function<void()>(
                           [=, all = data(), out = std::vector<Bits>(kElements)]() mutable {
                             run(width_kernels<Bits>(kernels()), all.data(), words.data(), out.data());
                           });
                     }});
  };
  const Bits pivot = bits_of<Bits>(0.8), low = bits_of<Bits>(0.799), high = bits_of<Bits>(0.801);
  add("count", [=](const auto& kernel, const Bits* all, std::uint64_t*, Bits*) {
    kernel.count_upto(all, kElements, pivot);
  });
  add("bracket", [=](const auto& kernel, const Bits* all, std::uint64_t*, Bits* out) {
    BracketCounts counts;
    for (std::size_t i = 0; i < kElements; i += kBracketLength)
      kernel.bracket(all + i, kBracketLength, low, high, false, out, &counts);
  });
  add("mark", [=](const auto& kernel, const Bits* all, std::uint64_t* words, Bits*) {
    kernel.threshold_mask(all, kElements, pivot, 0, words, nullptr);
  });
  add("mark and prune", [=](const auto& kernel, const Bits* all, std::uint64_t* words, Bits* out) {
    kernel.threshold_mask(all, kElements, pivot, 0, words, out);
  });
  add("apply a mask", [=](const auto& kernel, const Bits* all, std::uint64_t* words, Bits* out) {
    kernel.apply(all, kElements, words, out);
  });
  add("mark 2:4", [=](const auto& kernel, const Bits* all, std::uint64_t* words, Bits*) {
    kernel.nm_mask(all, kElements, 2, 4, words);
  });
}

// Weights with 20 % of their entries.
std::vector<float> weights() {
  std::vector<float> w(kRows * kCols);
  for (std::size_t i = 0; i < w.size(); ++i)
    w[i] = mixed(i + kElements) % 5 == 0 ? static_cast<float>(uniform(i)) : 0.0f;
  return w;
}

FormPtr bitmask_form(DType type) {
  if (type == DType::i8 || type == DType::i4) {
    std::vector<std::int8_t> w(kRows * kCols);
    for (std::size_t i = 0; i < w.size(); ++i)
      if (mixed(i + kElements) % 5 == 0) w[i] = static_cast<std::int8_t>(mixed(i) % 15 + 1);
    if (type == DType::i8) return pack_int8(w.data(), kRows, kCols, std::vector<float>(kRows, 1.0f).data());
    std::int8_t levels[16];
    for (std::size_t i = 0; i < 16; ++i) levels[i] = static_cast<std::int8_t>(i);
    return pack_int4(w.data(), kRows, kCols, 64, std::vector<float>(kRows * kCols / 64, 1.0f).data(), levels);
  }
  std::vector<float> w = weights();
  std::vector<std::uint16_t> narrow(w.size());
  for (std::size_t i = 0; i < w.size(); ++i)
    narrow[i] = static_cast<std::uint16_t>(bit_cast<std::uint32_t>(w[i]) >> 16);
  void* const data = type == DType::f32 ? static_cast<void*>(w.data()) : narrow.data();
  const auto width = static_cast<std::ptrdiff_t>(item_size(type));
  return pack_bitmask(View(data, type, {{kRows, static_cast<std::ptrdiff_t>(kCols) * width}, {kCols, width}}),
                      kRows, kCols);
}

void add_product(std::vector<Call>& calls, const std::string& name, DType type,
                 FormPtr (*form_of)(const Form&), std::size_t batch) {
  std::size_t entries = 0;
  for (std::size_t i = 0; i < kRows * kCols; ++i) entries += mixed(i + kElements) % 5 == 0;
  calls.push_back(
      {name + ", " + std::to_string(batch) + (batch == 1 ? " row" : " rows"), entries * batch, [=] {
         FormPtr form = bitmask_form(type);
         if (form_of != nullptr) form = form_of(*form);
         std::vector<float> x(batch * kCols);
         for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(uniform(i));
         return std::function<void()>([form, x, batch, y = std::vector<float>(batch * kRows)]() mutable {
           linear(*form, x.data(), batch, nullptr, "", y.data());
         });
       }});
}

std::vector<Call> all_calls() {
  std::vector<Call> calls;
  add_selection<std::uint16_t>(calls, "bfloat16");
  add_selection<std::uint32_t>(calls, "float32");
  add_selection<std::uint64_t>(calls, "float64");
  for (const auto type : {DType::f32, DType::bf16}) {
    const std::string suffix = type == DType::f32 ? " float32" : " bfloat16";
    for (const std::size_t batch : {1, 4}) add_product(calls, "bitmask" + suffix, type, nullptr, batch);
    for (const std::size_t batch : {1, 8}) add_product(calls, "slots" + suffix, type, &slots_of, batch);
    for (const std::size_t batch : {8, 16, 128})
      add_product(calls, "panels" + suffix, type, &panels_of, batch);
  }
  for (const std::size_t batch : {1, 2, 8, 128}) add_product(calls, "int8", DType::i8, &int8_slots_of, batch);
  for (const std::size_t batch : {1, 8}) add_product(calls, "int4", DType::i4, &int4_slots_of, batch);
  return calls;
}

}  // namespace

int main(int argc, char** argv) try {
  const std::vector<Call> calls = all_calls();
  if (argc == 1)
    for (const Call& call : calls) std::printf("%s\t%zu\n", call.name.c_str(), call.elements);
  if (argc != 5) return argc == 1 ? 0 : 2;
  set_num_threads(1);
  use_isa(argv[1]);
  use_int8_isa(argv[2]);
  for (const Call& call : calls)
    if (call.name == argv[3]) {
      const auto run = call.prepare();
      for (int i = std::atoi(argv[4]); i > 0; --i) run();
      return 0;
    }
  return 2;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
