// libFuzzer's place where there is no clang: `driver ROUNDS SEED FILE...` reads every file, which must be sound, and ROUNDS mutations of each.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

bool accepted(const std::string& bytes);

namespace {

const std::vector<std::string> kWords = {"-1", "1e999", "4294967295", "9223372036854775808", "null", "\"\"", "[", "{", "}", "]", ",",
                                         "\\u0000", std::string(4, '\xff'), std::string(4, '\0'), "\xff\xff\xff\x7f"};

// One of: another bit, a cut, a word put in or over, a piece doubled, a piece of another file.
void mutate(std::string& bytes, const std::string& other, std::mt19937& chance) {
  const auto below = [&](std::size_t limit) { return limit == 0 ? 0 : chance() % limit; };
  const std::size_t place = 1 + below(bytes.size());
  if (place >= bytes.size()) return;
  const std::size_t length = 1 + below(16);
  const std::string& word = kWords[below(kWords.size())];
  switch (below(6)) {
    case 0: bytes[place] ^= static_cast<char>(1 << below(8)); break;
    case 1: bytes.resize(place); break;
    case 2: bytes.insert(place, word); break;
    case 3: bytes.replace(place, length, word); break;
    case 4: bytes.insert(place, bytes.substr(place, 1 + below(256))); break;
    case 5: bytes.replace(place, length, other.substr(below(other.size()), length)); break;
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::mt19937 chance(static_cast<std::uint32_t>(std::atoi(arguments[2])));
  std::vector<std::string> corpus;
  for (int i = 3; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  for (const std::string& own : corpus) {
    if (!accepted(own)) {
      std::puts("a file of the corpus is refused");
      return 1;
    }
    for (int round = std::atoi(arguments[1]); round > 0; --round) {
      std::string bytes = own;
      for (std::size_t changes = 1 + chance() % 4; changes > 0; --changes) mutate(bytes, corpus[chance() % corpus.size()], chance);
      accepted(bytes);
    }
  }
  std::printf("%zu files, %s mutations of each\n", corpus.size(), arguments[1]);
}
