// CLIP's tokenizer, from the tables that `diffpress package` makes of it.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace diffpress {

class Tokenizer {
 public:
  // Throws UserError where the tables are damaged.
  explicit Tokenizer(const std::string& tables);

  struct Tokens {
    std::vector<std::int64_t> ids;
    // Tokens of the text that the fixed length had no place for.
    std::size_t cut;
  };
  // Ids of a text in UTF-8, cut and padded to the fixed length. Throws UserError where it is not UTF-8.
  Tokens encode(const std::string& text) const;

 private:
  enum class Class : std::uint8_t { other, letter, number, space };
  struct Literal {
    std::u32string text;
    std::vector<std::uint32_t> ids;
  };
  struct Range {
    char32_t first, last;
    Class kind;
  };
  struct Merge {
    std::uint32_t rank, id;
  };
  using Ids = std::vector<std::uint32_t>;

  std::u32string composed(const std::u32string& text) const;
  std::u32string lowered(const std::u32string& text) const;
  Class class_of(char32_t point) const;
  const Literal* literal_at(const std::vector<Literal>& among, const std::u32string& text, std::size_t place) const;
  void add_text(const std::u32string& text, Ids& ids) const;
  void add_normalized(const std::u32string& text, Ids& ids) const;
  void add_pieces(const std::u32string& text, Ids& ids) const;
  void add_word(const std::u32string& text, std::size_t start, std::size_t end, Ids& ids) const;

  std::size_t length_;
  std::uint32_t pad_, unknown_;
  Ids before_, after_;
  // Ids of a byte inside and at the end of a word.
  std::array<std::uint32_t, 256> inner_, last_;
  // Found in a text as it is, in a normalized one, and where a piece may begin.
  std::vector<Literal> raw_, normalized_, pieces_;
  std::vector<Range> classes_;
  std::unordered_map<std::uint64_t, Merge> merges_;
  std::unordered_map<char32_t, std::u32string> lower_, decomposed_;
  std::unordered_map<char32_t, std::uint8_t> order_;
  std::unordered_map<std::uint64_t, char32_t> composites_;
};

}  // namespace diffpress
