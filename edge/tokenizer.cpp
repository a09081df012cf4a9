#include "tokenizer.h"

#include <algorithm>
#include <queue>

#include "errors.h"
#include "reader.h"
#include "utf8.h"

namespace diffpress {

namespace {

constexpr std::uint32_t kNone = 0xffffffff;
constexpr char32_t kHangulFirst = 0xac00, kHangulCount = 11172, kLead = 0x1100, kVowel = 0x1161, kTail = 0x11a7;
constexpr char32_t kLeads = 19, kVowels = 21, kTails = 28;

std::uint64_t pair(std::uint64_t first, std::uint64_t second) { return first << 32 | second; }

// Length of 's, 't, 're, 've, 'm, 'll or 'd at a place, or 0.
std::size_t contraction(const std::u32string& text, std::size_t place) {
  for (const char32_t* ending : {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"}) {
    const std::u32string known(ending);
    if (text.compare(place, known.size(), known) == 0) return known.size();
  }
  return 0;
}

}  // namespace

// In the order in which export/bundle/tokenizer.py writes.
Tokenizer::Tokenizer(const std::string& tables) {
  Reader reader(tables, "the tokenizer");
  reader.expect("DPTOKEN1");
  length_ = reader.below(1 << 16);
  pad_ = reader.word(), unknown_ = reader.word();
  before_ = reader.words(), after_ = reader.words();
  for (std::uint32_t& id : inner_) id = reader.word();
  for (std::uint32_t& id : last_) id = reader.word();
  for (auto* literals : {&raw_, &normalized_, &pieces_})
    for (std::uint32_t count = reader.count(); count > 0; --count) {
      Literal literal{reader.points(), reader.words()};
      if (literal.text.empty()) reader.damaged();
      literals->push_back(std::move(literal));
    }
  for (std::uint32_t count = reader.count(), rank = 0; rank < count; ++rank) {
    const std::uint64_t first = reader.word(), second = reader.word();
    merges_[pair(first, second)] = {rank, reader.word()};
  }
  for (std::uint32_t count = reader.count(); count > 0; --count) {
    const char32_t first = reader.word(), last = reader.word();
    classes_.push_back({first, last, static_cast<Class>(reader.below(4))});
    const bool sorted = classes_.size() == 1 || classes_[classes_.size() - 2].last < first;
    if (first > last || !sorted) reader.damaged();
  }
  for (auto* points : {&lower_, &decomposed_})
    for (std::uint32_t count = reader.count(); count > 0; --count) {
      const char32_t point = reader.word();
      (*points)[point] = reader.points();
    }
  for (std::uint32_t count = reader.count(); count > 0; --count) {
    const char32_t point = reader.word();
    order_[point] = static_cast<std::uint8_t>(reader.below(256));
  }
  for (std::uint32_t count = reader.count(); count > 0; --count) {
    const std::uint64_t first = reader.word(), second = reader.word();
    composites_[pair(first, second)] = reader.word();
  }
  reader.end();
  if (length_ < before_.size() + after_.size()) reader.damaged();
}

Tokenizer::Tokens Tokenizer::encode(const std::string& text) const {
  Ids found;
  add_text(decoded_utf8(text), found);
  const std::size_t place = length_ - before_.size() - after_.size();
  const std::size_t cut = found.size() > place ? found.size() - place : 0;
  found.resize(found.size() - cut);
  std::vector<std::int64_t> ids(before_.begin(), before_.end());
  ids.insert(ids.end(), found.begin(), found.end());
  ids.insert(ids.end(), after_.begin(), after_.end());
  ids.resize(length_, pad_);
  return {ids, cut};
}

const Tokenizer::Literal* Tokenizer::literal_at(const std::vector<Literal>& among, const std::u32string& text,
                                                std::size_t place) const {
  const Literal* longest = nullptr;
  for (const Literal& literal : among) {
    const bool here = text.compare(place, literal.text.size(), literal.text) == 0;
    if (here && (!longest || literal.text.size() > longest->text.size())) longest = &literal;
  }
  return longest;
}

// Special tokens are found in the text as it is; what lies between them is normalized.
void Tokenizer::add_text(const std::u32string& text, Ids& ids) const {
  std::size_t start = 0;
  for (std::size_t place = 0; place < text.size();) {
    const Literal* literal = literal_at(raw_, text, place);
    if (!literal) {
      ++place;
      continue;
    }
    add_normalized(text.substr(start, place - start), ids);
    ids.insert(ids.end(), literal->ids.begin(), literal->ids.end());
    start = place += literal->text.size();
  }
  add_normalized(text.substr(start), ids);
}

void Tokenizer::add_normalized(const std::u32string& raw, Ids& ids) const {
  const std::u32string text = lowered(composed(raw));
  std::size_t start = 0;
  for (std::size_t place = 0; place < text.size();) {
    const Literal* literal = literal_at(normalized_, text, place);
    if (!literal) {
      ++place;
      continue;
    }
    add_pieces(text.substr(start, place - start), ids);
    ids.insert(ids.end(), literal->ids.begin(), literal->ids.end());
    start = place += literal->text.size();
  }
  add_pieces(text.substr(start), ids);
}

// Contractions, runs of letters, single numbers, and runs of what is neither those nor space.
void Tokenizer::add_pieces(const std::u32string& text, Ids& ids) const {
  for (std::size_t place = 0; place < text.size();) {
    if (const Literal* literal = literal_at(pieces_, text, place)) {
      ids.insert(ids.end(), literal->ids.begin(), literal->ids.end());
      place += literal->text.size();
      continue;
    }
    const Class kind = class_of(text[place]);
    std::size_t end = place + std::max<std::size_t>(contraction(text, place), 1);
    const bool run = end == place + 1 && (kind == Class::letter || kind == Class::other);
    while (run && end < text.size() && class_of(text[end]) == kind) ++end;
    if (kind != Class::space) add_word(text, place, end, ids);
    place = end;
  }
}

Tokenizer::Class Tokenizer::class_of(char32_t point) const {
  const auto after = std::upper_bound(classes_.begin(), classes_.end(), point,
                                      [](char32_t value, const Range& range) { return value < range.first; });
  return after != classes_.begin() && point <= std::prev(after)->last ? std::prev(after)->kind : Class::other;
}

// Byte pair encoding: of all neighbours that may merge those of the lowest rank do, the leftmost first.
// R. Sennrich, B. Haddow and A. Birch, Neural machine translation of rare words with subword units, 2016, arXiv:1508.07909.
void Tokenizer::add_word(const std::u32string& text, std::size_t start, std::size_t end, Ids& ids) const {
  const std::string bytes = encoded_utf8(text, start, end);
  struct Symbol {
    std::uint32_t id;
    std::size_t before, after;
    bool gone;
  };
  constexpr std::size_t none = ~std::size_t{0};
  std::vector<Symbol> symbols;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const auto byte = static_cast<unsigned char>(bytes[i]);
    const std::uint32_t id = (i + 1 == bytes.size() ? last_ : inner_)[byte];
    if (id == kNone && unknown_ == kNone) continue;
    symbols.push_back({id == kNone ? unknown_ : id, symbols.empty() ? none : symbols.size() - 1, symbols.size() + 1, false});
  }
  if (symbols.empty()) return;
  symbols.back().after = none;
  struct Candidate {
    std::uint32_t rank, id;
    std::size_t place;
    std::uint32_t first, second;
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : place > other.place; }
  };
  std::priority_queue<Candidate> candidates;
  const auto consider = [&](std::size_t place) {
    if (place == none || symbols[place].after == none) return;
    const std::uint32_t first = symbols[place].id, second = symbols[symbols[place].after].id;
    const auto merge = merges_.find(pair(first, second));
    if (merge != merges_.end()) candidates.push({merge->second.rank, merge->second.id, place, first, second});
  };
  for (std::size_t place = 0; place < symbols.size(); ++place) consider(place);
  while (!candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    Symbol& left = symbols[best.place];
    const bool stale = left.gone || left.after == none || left.id != best.first || symbols[left.after].id != best.second;
    if (stale) continue;
    Symbol& right = symbols[left.after];
    left.id = best.id, right.gone = true, left.after = right.after;
    if (left.after != none) symbols[left.after].before = best.place;
    consider(left.before);
    consider(best.place);
  }
  for (std::size_t place = 0; place != none; place = symbols[place].after) ids.push_back(symbols[place].id);
}

std::u32string Tokenizer::lowered(const std::u32string& text) const {
  std::u32string found;
  for (const char32_t point : text) {
    const auto lower = lower_.find(point);
    lower == lower_.end() ? found.push_back(point) : static_cast<void>(found += lower->second);
  }
  return found;
}

// Unicode's normalization form C (Unicode Standard Annex 15).
std::u32string Tokenizer::composed(const std::u32string& text) const {
  std::u32string apart;
  for (const char32_t point : text) {
    const auto parts = decomposed_.find(point);
    if (parts != decomposed_.end()) {
      apart += parts->second;
    } else if (point - kHangulFirst < kHangulCount) {
      const char32_t index = point - kHangulFirst;
      apart += kLead + index / (kVowels * kTails);
      apart += kVowel + index / kTails % kVowels;
      if (index % kTails != 0) apart += kTail + index % kTails;
    } else {
      apart += point;
    }
  }
  const auto order = [&](char32_t point) {
    const auto found = order_.find(point);
    return found == order_.end() ? std::uint8_t{0} : found->second;
  };
  for (std::size_t start = 0; start < apart.size();) {
    std::size_t end = start;
    while (end < apart.size() && order(apart[end]) != 0) ++end;
    std::stable_sort(apart.begin() + start, apart.begin() + end, [&](char32_t a, char32_t b) { return order(a) < order(b); });
    start = end + 1;
  }
  std::u32string found;
  std::size_t starter = std::u32string::npos;
  std::uint8_t blocking = 0;
  for (const char32_t point : apart) {
    const std::uint8_t own = order(point);
    const bool adjacent = starter != std::u32string::npos && starter + 1 == found.size();
    if (starter != std::u32string::npos && (adjacent || (blocking < own && blocking != 0))) {
      const char32_t first = found[starter];
      char32_t whole = 0;
      const auto composite = composites_.find(pair(first, point));
      if (composite != composites_.end()) {
        whole = composite->second;
      } else if (adjacent && first - kLead < kLeads && point - kVowel < kVowels) {
        whole = kHangulFirst + ((first - kLead) * kVowels + (point - kVowel)) * kTails;
      } else if (adjacent && first - kHangulFirst < kHangulCount && (first - kHangulFirst) % kTails == 0 && point - kTail - 1 < kTails - 1) {
        whole = first + (point - kTail);
      }
      if (whole != 0) {
        found[starter] = whole;
        continue;
      }
    }
    if (own == 0) starter = found.size();
    blocking = own;
    found.push_back(point);
  }
  return found;
}

}  // namespace diffpress
