#include "cuda/emulation/races.h"

#include <stdexcept>
#include <string_view>

namespace flashmaps::cuda::emulation {

std::string place(const char* file, unsigned line) {
  std::string_view name = file;
  const std::size_t slash = name.find_last_of("/\\");
  if (slash != std::string_view::npos) name.remove_prefix(slash + 1);
  return std::string(name) + ":" + std::to_string(line);
}

void Races::begin(int shared_bytes) {
  const std::size_t words = std::size_t(shared_bytes + 3) / 4;
  words_.assign(words, Cell{});
  split_.assign(words, 0);
  files_.clear();
  clock_ = 0;
  sync_threads();
}

void Races::sync_threads() {
  block_time_ = ++clock_;
  for (std::uint32_t& time : warp_time_) time = clock_;
}

void Races::sync_warp(int warp) {
  warp_time_[warp] = ++clock_;
}

Races::Stamp Races::stamp(Actor actor, Here here) {
  const char* const name = here.file_name();
  std::size_t file = 0;
  while (file < files_.size() && files_[file] != name) ++file;
  if (file == files_.size()) files_.push_back(name);
  if (file >= 32 || here.line() >= 1 << 15) throw std::length_error("Races::Stamp is too narrow");
  Stamp now;
  now.time = warp_time_[warp_of(actor)];
  now.actor = std::uint32_t(actor);
  now.file = std::uint32_t(file);
  now.line = here.line();
  return now;
}

// Calls touch(cell, offset of its first byte) for what the bytes consist of.
template <class Touch>
void Races::for_cells(int offset, int bytes, Touch touch) {
  const int end = offset + bytes;
  for (int at = offset; at < end;) {
    const std::size_t word = std::size_t(at) / 4;
    if (at % 4 == 0 && end - at >= 4 && split_[word] == 0) {
      touch(words_[word], at);
      at += 4;
      continue;
    }
    if (split_[word] == 0) {
      if (bytes_.size() < 4 * words_.size()) bytes_.resize(4 * words_.size());
      for (std::size_t byte = 4 * word; byte < 4 * word + 4; ++byte) bytes_[byte] = words_[word];
      split_[word] = 1;
    }
    touch(bytes_[std::size_t(at)], at);
    at += 1;
  }
}

bool Races::conflict(const Stamp& before, const Stamp& now) const {
  if (before.copying != 0) return true;
  if (before.time < block_time_ || before.actor == now.actor) return false;
  return warp_of(Actor(before.actor)) != warp_of(Actor(now.actor)) || before.time == now.time;
}

void Races::touch_read(Cell& cell, const Stamp& now, int offset) const {
  if (conflict(cell.write, now)) report(cell.write, "wrote", now, "reads", offset);
  const Stamp before = cell.read;
  cell.read = now;
  if (before.time < block_time_) {
    cell.beside = cell.elsewhere = Stamp{};
  } else if (warp_of(Actor(before.actor)) != warp_of(Actor(now.actor))) {
    cell.elsewhere = before;
    cell.beside = Stamp{};
  } else if (before.time < now.time) {
    cell.beside = Stamp{};
  } else if (before.actor != now.actor) {
    cell.beside = before;
  }
}

void Races::touch_write(Cell& cell, const Stamp& now, int offset) const {
  if (conflict(cell.write, now)) report(cell.write, "wrote", now, "writes", offset);
  for (const Stamp& read : {cell.read, cell.beside, cell.elsewhere}) {
    if (conflict(read, now)) report(read, "read", now, "writes", offset);
  }
  cell = Cell{};
  cell.write = now;
}

void Races::read(Actor actor, int offset, int bytes, Here here) {
  const Stamp now = stamp(actor, here);
  for_cells(offset, bytes, [&](Cell& cell, int at) { touch_read(cell, now, at); });
}

void Races::write(Actor actor, int offset, int bytes, Here here) {
  const Stamp now = stamp(actor, here);
  for_cells(offset, bytes, [&](Cell& cell, int at) { touch_write(cell, now, at); });
}

void Races::begin_copy(Actor actor, int offset, int bytes, Here here) {
  Stamp now = stamp(actor, here);
  now.copying = 1;
  for_cells(offset, bytes, [&](Cell& cell, int at) { touch_write(cell, now, at); });
}

void Races::end_copy(Actor actor, int offset, int bytes, Here here) {
  const Stamp now = stamp(actor, here);
  for_cells(offset, bytes, [&](Cell& cell, int) { cell.write = now; });
}

void Races::report(const Stamp& before, const char* did, const Stamp& now, const char* does,
                   int offset) const {
  const auto who = [](const Stamp& stamp) {
    const Actor actor = Actor(stamp.actor);
    return actor < kMaxThreads ? "thread " + std::to_string(actor)
                               : "warp " + std::to_string(warp_of(actor));
  };
  const auto where = [&](const Stamp& stamp) { return place(files_[stamp.file], stamp.line); };
  std::string text = "a race: " + who(now) + " " + does + " byte " + std::to_string(offset) +
                     " of shared memory at " + where(now) + ", ";
  if (before.copying != 0) {
    text += "into which " + who(before) + " copies asynchronously since " + where(before) +
            " and has not waited for it";
  } else {
    text += "which " + who(before) + " " + did + " at " + where(before) +
            ", and no barrier stands between";
  }
  throw std::runtime_error(text);
}

}  // namespace flashmaps::cuda::emulation
