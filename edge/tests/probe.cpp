// What tests ask the runner's parts alone: `probe noise SIZE SEED` gives floats, `probe tokens TABLES` ids of texts on standard input.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

#include "../noise.h"
#include "../tokenizer.h"

int main(int, char** arguments) {
  using namespace diffpress;
  if (std::strcmp(arguments[1], "noise") == 0) {
    const auto values = TorchNoise(std::strtoull(arguments[3], nullptr, 10)).draw(std::strtoull(arguments[2], nullptr, 10));
    std::fwrite(values.data(), sizeof(float), values.size(), stdout);
    return 0;
  }
  std::ifstream file(arguments[2], std::ios::binary);
  const std::string tables(std::istreambuf_iterator<char>(file), {});
  const Tokenizer tokenizer(tables);
  // Texts end in a zero.
  for (std::string text; std::getline(std::cin, text, '\0');) {
    for (const auto id : tokenizer.encode(text).ids) std::printf("%lld ", static_cast<long long>(id));
    std::puts("");
  }
}
