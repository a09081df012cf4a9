// Files of the bundle: read whole up to a limit, and held against their digests.
#pragma once
#include <cstdint>
#include <string>

namespace diffpress {

// A path in the bundle. Throws UserError where `name` would leave it, through "..", a root or a link.
std::string inside(const std::string& folder, const std::string& name);

// All bytes of a file. Throws UserError where it is missing or has more than `limit` bytes.
std::string read_file(const std::string& path, std::size_t limit);

// Throws UserError where a file has another size or SHA-256.
void check_file(const std::string& folder, const std::string& name, std::uint64_t size, const std::string& sha256);

// Put `bytes` in the place of a file, whole or not at all.
void write_file(const std::string& path, const std::string& bytes);

}  // namespace diffpress
