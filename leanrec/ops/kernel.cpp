// Look-ups in coded tables on a CPU: what leanrec/ops/fused.py calls.
//
// A table is read by a Reader, which knows where the codes of a row lie and what they stand for; one driver for all of them goes through
// the ids, asks for the codes of a later id ahead of time, refuses ids out of range, pools bags and shares the work among threads.
// Tensors come as addresses, so nothing here needs torch. N ids, V rows, D columns, K words of a code book.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>
#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <type_traits>
#include <variant>
#include <vector>

namespace nb = nanobind;

#if !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__) || defined(__clang__)
#define FOR_EACH_CPU
#elif __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t kAhead = 16;               // ids between the one that is read and the one whose codes are asked for
#ifdef _OPENMP
constexpr int64_t kValuesPerThread = 1 << 15;  // as torch shares its work
#else
constexpr int64_t kValuesPerThread = 1 << 17;  // a thread costs some ten microseconds, in which another one writes so many values
#endif
constexpr int64_t kTile = 16;                  // columns of a word that are added up at once, a line of the cache
constexpr int64_t kRowsOfTile = 4096;          // rows whose words are added up before it is the next tile's turn
constexpr int64_t kRowsAhead = 4;              // between the row of a tile that is written and the one that is asked for
constexpr int64_t kMaxLevels = 32;
constexpr int64_t kFine = -1, kBadBorders = -2, kBadOffsets = -3;  // beside the place of an id that is out of range

// Codes of 1 to 32 bits in one stream, lowest bit first, as leanrec/ops/packing.py lays them out.
struct Codes {
    const uint8_t* bytes;
    int64_t nbytes;
    int64_t bits;

    INLINE uint64_t at(int64_t index) const {
        if (bits == 8) return bytes[index];
        int64_t available;
        return several(index, available) & ((uint64_t{1} << bits) - 1);
    }

    // Codes from one on, the first of them lowest, and how many bits of them there are.
    INLINE uint64_t several(int64_t index, int64_t& available) const {
        if (nbytes < 8) {
            available = bits;
            return at_in_few(index);
        }
        const int64_t first = index * bits, byte = std::min(first >> 3, nbytes - 8), shift = (first - 8 * byte) & 63;  // the last are in the last 8 bytes
        uint64_t read;
        std::memcpy(&read, bytes + byte, 8);
        available = 64 - shift;
        return read >> shift;
    }

    __attribute__((noinline)) uint64_t at_in_few(int64_t index) const {
        uint64_t read = 0;
        std::memcpy(&read, bytes, nbytes);
        return (read >> (index * bits & 63)) & ((uint64_t{1} << bits) - 1);
    }

    INLINE void prefetch(int64_t index, int64_t count) const {
        const uint8_t* first = bytes + (index * bits >> 3);
        __builtin_prefetch(first);
        __builtin_prefetch(bytes + std::min(nbytes - 1, ((index + count) * bits >> 3)));
    }
};

INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24
        const float value = float(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Eight columns at once, wherever they begin.
using Eight = float __attribute__((vector_size(32), aligned(4), may_alias));

template <class Number, int Bytes>
using Numbers __attribute__((vector_size(Bytes))) = Number;

// Some of the sixteen numbers of two.
template <int... places>
INLINE Eight pick(Eight first, Eight second) {
#ifdef __clang__
    return __builtin_shufflevector(first, second, places...);
#else
    return __builtin_shuffle(first, second, Numbers<int32_t, 32>{places...});
#endif
}

INLINE Eight& eight(float* values) { return *reinterpret_cast<Eight*>(values); }
INLINE const Eight& eight(const float* values) { return *reinterpret_cast<const Eight*>(values); }

// What four sums have in places i and i + 4 side by side, for i = 0 to 3.
INLINE void pick_fours(const Eight* sums, Eight* fours) {
    const Eight low01 = pick<0, 8, 1, 9, 4, 12, 5, 13>(sums[0], sums[1]), high01 = pick<2, 10, 3, 11, 6, 14, 7, 15>(sums[0], sums[1]);
    const Eight low23 = pick<0, 8, 1, 9, 4, 12, 5, 13>(sums[2], sums[3]), high23 = pick<2, 10, 3, 11, 6, 14, 7, 15>(sums[2], sums[3]);
    fours[0] = pick<0, 1, 8, 9, 4, 5, 12, 13>(low01, low23);
    fours[1] = pick<2, 3, 10, 11, 6, 7, 14, 15>(low01, low23);
    fours[2] = pick<0, 1, 8, 9, 4, 5, 12, 13>(high01, high23);
    fours[3] = pick<2, 3, 10, 11, 6, 7, 14, 15>(high01, high23);
}

// From sums of every fourth column, the first of them in sums[0], to columns in their order.
INLINE void side_by_side(const Eight (&sums)[4], Eight (&columns)[4]) {
    Eight fours[4];
    pick_fours(sums, fours);
    columns[0] = pick<0, 1, 2, 3, 8, 9, 10, 11>(fours[0], fours[1]);
    columns[1] = pick<0, 1, 2, 3, 8, 9, 10, 11>(fours[2], fours[3]);
    columns[2] = pick<4, 5, 6, 7, 12, 13, 14, 15>(fours[0], fours[1]);
    columns[3] = pick<4, 5, 6, 7, 12, 13, 14, 15>(fours[2], fours[3]);
}

// The same for sums of every eighth column.
INLINE void side_by_side(const Eight (&sums)[8], Eight (&columns)[8]) {
    Eight first[4], second[4];
    pick_fours(sums, first);
    pick_fours(sums + 4, second);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
        columns[part] = pick<0, 1, 2, 3, 8, 9, 10, 11>(first[part], second[part]);
        columns[part + 4] = pick<4, 5, 6, 7, 12, 13, 14, 15>(first[part], second[part]);
    }
}

// out = or += factor * word.
template <bool Add>
INLINE void put(float* out, const float* word, float factor, int64_t width) {
    int64_t column = 0;
    for (; column + 8 <= width; column += 8) {
        const Eight values = factor * eight(word + column);
        eight(out + column) = Add ? eight(out + column) + values : values;
    }
    for (; column < width; ++column) out[column] = (Add ? out[column] : 0) + factor * word[column];
}

// out = or += factor * (the sum of some words), Tiles * 8 columns at a time, which stay in registers, from `column` on; returns where it ended.
template <bool Add, int Tiles>
INLINE int64_t put_sum(float* out, const float* const* words, int64_t num_words, float factor, int64_t column, int64_t width) {
    for (; column + 8 * Tiles <= width; column += 8 * Tiles) {
        Eight sums[Tiles] = {};
        for (int64_t word = 0; word < num_words; ++word) {
#pragma GCC unroll 8
            for (int tile = 0; tile < Tiles; ++tile) sums[tile] += eight(words[word] + column + 8 * tile);
        }
#pragma GCC unroll 8
        for (int tile = 0; tile < Tiles; ++tile) {
            float* values = out + column + 8 * tile;
            eight(values) = Add ? eight(values) + factor * sums[tile] : factor * sums[tile];
        }
    }
    return column;
}

template <bool Add>
INLINE void put_sum(float* out, const float* const* words, int64_t num_words, float factor, int64_t width) {
    int64_t column = put_sum<Add, 8>(out, words, num_words, factor, 0, width);
    column = put_sum<Add, 2>(out, words, num_words, factor, column, width);
    for (; column < width; ++column) {
        float sum = 0;
        for (int64_t word = 0; word < num_words; ++word) sum += words[word][column];
        out[column] = (Add ? out[column] : 0) + factor * sum;
    }
}

// Rows that have a word of each of some code books.
template <class Value>
struct Books {
    Codes codes;
    const Value* books;  // (M, K, width)
    int64_t num_books, num_words, width;

    INLINE void prefetch(int64_t row) const { codes.prefetch(row * num_books, num_books); }

    // Whether codes are bytes that cannot be too large: the usual case, in which there is nothing to unpack and nothing to check.
    INLINE bool are_bytes() const { return codes.bits == 8 && num_words == 256; }

    template <bool Bytes>
    INLINE const Value* word(int64_t row, int64_t book, int64_t columns) const {
        const int64_t place = row * num_books + book;
        if (Bytes) return books + (book * 256 + codes.bytes[place]) * columns;
        return books + (book * num_words + std::min<int64_t>(codes.at(place), num_words - 1)) * columns;
    }
};

// A row is one word of each of M code books side by side.
struct Concat : Books<float> {
    template <bool Add>
    INLINE void read(int64_t row, float factor, float* out) const {
        // Where the compiler knows the width, a word is a few instructions without a loop.
        if (!are_bytes()) return read_words<Add, false>(row, factor, out, width);
        if (width == 8) return read_words<Add, true>(row, factor, out, 8);
        if (width == 16) return read_words<Add, true>(row, factor, out, 16);
        if (width == 32) return read_words<Add, true>(row, factor, out, 32);
        read_words<Add, true>(row, factor, out, width);
    }

    template <bool Add, bool Bytes>
    INLINE void read_words(int64_t row, float factor, float* out, int64_t columns) const {
        for (int64_t book = 0; book < num_books; ++book) put<Add>(out + book * columns, word<Bytes>(row, book, columns), factor, columns);
    }
};

// A row is the sum of one word of each of L code books.
struct Sum : Books<float> {
    template <bool Add>
    INLINE void read(int64_t row, float factor, float* out) const {
        const float* words[kMaxLevels];
        const bool bytes = are_bytes();
        for (int64_t book = 0; book < num_books; ++book) words[book] = bytes ? word<true>(row, book, width) : word<false>(row, book, width);
        put_sum<Add>(out, words, num_books, factor, width);
    }
};

// A row is the sum of one word of whole numbers of each of L code books, times a scale for each column.
struct ByteSum : Books<int8_t> {
    const float* scales;

    template <bool Add>
    INLINE void read(int64_t row, float factor, float* out) const {
        const int8_t* words[kMaxLevels];
        const bool bytes = are_bytes();
        for (int64_t book = 0; book < num_books; ++book) words[book] = bytes ? word<true>(row, book, width) : word<false>(row, book, width);
        int64_t column = put_pairs<Add, 2>(words, factor, out, 0);
        column = put_pairs<Add, 1>(words, factor, out, column);
        for (; column < width; ++column) {
            int32_t sum = 0;
            for (int64_t book = 0; book < num_books; ++book) sum += words[book][column];
            out[column] = (Add ? out[column] : 0) + factor * (scales[column] * float(sum));
        }
    }

    // Tiles * 32 columns at a time, two of which are one number of 16 bits, so that nothing is widened before it is summed; returns where it ended.
    template <bool Add, int Tiles>
    INLINE int64_t put_pairs(const int8_t* const* words, float factor, float* out, int64_t column) const {
        for (; column + 32 * Tiles <= width; column += 32 * Tiles) {
            Numbers<uint16_t, 32> both[Tiles] = {};   // first + 256 * second, the sums of two columns, but for what is beyond 16 bits
            Numbers<int16_t, 32> second[Tiles] = {};  // 32 words do not fill 16 bits
            for (int64_t book = 0; book < num_books; ++book) {
#pragma GCC unroll 2
                for (int tile = 0; tile < Tiles; ++tile) {
                    Numbers<int16_t, 32> pairs;
                    std::memcpy(&pairs, words[book] + column + 32 * tile, 32);
                    pairs ^= 128;  // adds 128 to the first, which is not negative then and takes nothing from the second
                    both[tile] += Numbers<uint16_t, 32>(pairs);
                    second[tile] += pairs >> 8;
                }
            }
#pragma GCC unroll 2
            for (int tile = 0; tile < Tiles; ++tile) {
                const auto first = both[tile] - (Numbers<uint16_t, 32>(second[tile]) << 8) - uint16_t(128 * num_books);
                const auto even = Numbers<int32_t, 32>(first), odd = Numbers<int32_t, 32>(second[tile]);
                const Eight sums[4] = {as_floats(even << 16 >> 16), as_floats(odd << 16 >> 16), as_floats(even >> 16), as_floats(odd >> 16)};
                Eight columns[4];
                side_by_side(sums, columns);
#pragma GCC unroll 4
                for (int part = 0; part < 4; ++part) {
                    const int64_t place = column + 32 * tile + 8 * part;
                    const Eight row = factor * (eight(scales + place) * columns[part]);
                    eight(out + place) = Add ? eight(out + place) + row : row;
                }
            }
        }
        return column;
    }

    static INLINE Eight as_floats(Numbers<int32_t, 32> numbers) { return __builtin_convertvector(numbers, Numbers<float, 32>); }
};

// Eight numbers of 32 bits, wherever they begin: what is made for Python lies at multiples of 16 bytes, not of 32.
using Mask = uint32_t __attribute__((vector_size(32), aligned(4)));

// A row is the mean and one word of each level that it has; words are rounded to 4 bits, with a scale each.
struct Levels {
    Codes codes;
    Codes ranks;  // bits = 0: rows are in the order of their ranks
    const float* mean;
    const int64_t* borders;  // (L,), never rising: ranks below it have a code of the level
    const uint8_t* packed;   // (L K, D / 2)
    const uint16_t* scales;  // (L K,) float16
    int64_t num_levels, num_words, width, num_rows;
    int64_t before[kMaxLevels + 1] = {};  // rank * length + before[length] is the place of the first code
    const float* steps = nullptr;         // (L K,): of all words, where a call reads so many rows that it pays
    Mask masks[8] = {};                   // of each nibble; as constants, the compiler would make them anew for every word

    // Whether the borders are such as a table can have; what comes from a file may be anything. `room` keeps the steps.
    bool prepare(int64_t num_reads, std::vector<float>& room) {
        int64_t num_codes = 0;
        for (int64_t level = num_levels; level-- > 0;) {
            if (borders[level] < 0 || borders[level] > (level ? borders[level - 1] : num_rows)) return false;
            num_codes = before[level] = before[level + 1] + borders[level];
        }
        if (num_codes * codes.bits > codes.nbytes * 8) return false;
        for (int nibble = 0; nibble < 8; ++nibble) masks[nibble] += 15u << 4 * nibble;
        if (num_reads > num_words) {
            for (int64_t word = 0; word < num_levels * num_words; ++word) room.push_back(step_of(scales[word]));
            steps = room.data();
        }
        return true;
    }

    INLINE int64_t rank(int64_t row) const { return ranks.bits ? std::min<int64_t>(ranks.at(row), num_rows - 1) : row; }

    INLINE int64_t length(int64_t rank) const {
        int64_t length = 0;
        for (int64_t level = 0; level < num_levels; ++level) length += rank < borders[level];
        return length;
    }

    INLINE void prefetch(int64_t row) const {
        if (ranks.bits) return ranks.prefetch(row, 1);
        const int64_t levels = length(row);
        if (levels) codes.prefetch(row * levels + before[levels], levels);
    }

    template <bool Add>
    INLINE void read(int64_t row, float factor, float* out) const {
        const int64_t place = rank(row), levels = length(place), first = place * levels + before[levels];
        int64_t column = 0;
        for (; column + 64 <= width; column += 64) put_nibbles<Add, uint32_t>(first, levels, column, factor, out + column);
        for (; column + 32 <= width; column += 32) put_nibbles<Add, uint16_t>(first, levels, column, factor, out + column);
        if (column == width) return;
        put<Add>(out + column, mean + column, factor, width - column);
        for_each_word(first, levels, column, factor, [&](const uint8_t* word, float step) { add_packed(out + column, word, step, (width - column) / 2); });
    }

    // Calls each(from a column of a word on, factor * its step) for the words of a row, whose codes begin at a place.
    template <class Each>
    INLINE void for_each_word(int64_t place, int64_t levels, int64_t column, float factor, const Each& each) const {
        const uint8_t* first_word = packed + column / 2;
        const uint64_t mask = (uint64_t{1} << codes.bits) - 1;
        uint64_t window = 0;  // codes of this level and later ones
        int64_t available = 0;
        for (int64_t level = 0; level < levels; ++level) {
            if (available < codes.bits) window = codes.several(place + level, available);
            const int64_t word = level * num_words + std::min<int64_t>(window & mask, num_words - 1);
            window >>= codes.bits;
            available -= codes.bits;
            each(first_word + word * (width / 2), factor * (steps ? steps[word] : step_of(scales[word])));
        }
    }

    // The nibble q of a column stands for q - 7.5 steps.
    static constexpr float kLowest = -7.5f;
    static INLINE float step_of(uint16_t scale) { return half_to_float(scale) * (2.0f / 15); }

    // Eight numbers of 16 or 32 bits hold the nibbles of 32 or 64 columns of a word. A nibble that stays where it stands in its number counts 16,
    // 256, ... times as much, which is mended once for a row.
    template <bool Add, class Number>
    INLINE void put_nibbles(int64_t place, int64_t levels, int64_t column, float factor, float* out) const {
        constexpr int kNibbles = 2 * sizeof(Number);
        Eight sums[kNibbles], columns[kNibbles];  // sums: nibble n of number i, of column kNibbles * i + n
#pragma GCC unroll 8
        for (int n = 0; n < kNibbles; ++n) sums[n] = Eight{};
        float lowest = 0;
        for_each_word(place, levels, column, factor, [&](const uint8_t* word, float step) {
            Numbers<Number, 8 * sizeof(Number)> numbers;
            std::memcpy(&numbers, word, sizeof(numbers));
            const auto wide = __builtin_convertvector(numbers, Numbers<uint32_t, 32>);
            lowest += kLowest * step;
#pragma GCC unroll 8
            for (int n = 0; n < kNibbles; ++n) {
                const auto nibbles = n < 7 ? wide & masks[n] : wide >> 28;
                sums[n] += step * __builtin_convertvector(reinterpret_cast<const Numbers<int32_t, 32>&>(nibbles), Numbers<float, 32>);
            }
        });
#pragma GCC unroll 8
        for (int n = 1; n < kNibbles; ++n) sums[n] *= n < 7 ? 1.0f / float(1 << 4 * n) : 1.0f;
        side_by_side(sums, columns);
#pragma GCC unroll 8
        for (int part = 0; part < kNibbles; ++part) {
            const Eight row = factor * eight(mean + column + 8 * part) + lowest + columns[part];
            eight(out + 8 * part) = Add ? eight(out + 8 * part) + row : row;
        }
    }

    static INLINE void add_packed(float* __restrict out, const uint8_t* __restrict word, float factor, int64_t num_pairs) {
        for (int64_t pair = 0; pair < num_pairs; ++pair) {
            out[2 * pair] += factor * (float(word[pair] & 15) + kLowest);
            out[2 * pair + 1] += factor * (float(word[pair] >> 4) + kLowest);
        }
    }
};

// A row is rounded to 8, 4 or 2 bits a value, with a scale for each group of columns.
template <int Bits>
struct Scaled {
    const uint8_t* codes;    // (V, D Bits / 8)
    const uint16_t* scales;  // (V, groups) float16
    int64_t width, group, num_groups;

    INLINE void prefetch(int64_t row) const {
        const int64_t bytes = width * Bits / 8;
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(codes + row * bytes + byte);
        __builtin_prefetch(scales + row * num_groups);
    }

    template <bool Add>
    INLINE void read(int64_t row, float factor, float* out) const {
        constexpr int kPerByte = 8 / Bits, kLast = (1 << Bits) - 1;
        const uint8_t* bytes = codes + row * (width / kPerByte);
        for (int64_t number = 0; number < num_groups; ++number) {
            const float step = half_to_float(scales[row * num_groups + number]) * factor * (2.0f / kLast);
            const int64_t start = number * group, count = std::min(group, width - start) / kPerByte;
            float* __restrict values = out + start;
            const uint8_t* __restrict read = bytes + start / kPerByte;
            for (int64_t byte = 0; byte < count; ++byte) {
                for (int part = 0; part < kPerByte; ++part) {
                    const float value = step * (float(read[byte] >> (part * Bits) & kLast) - kLast / 2.0f);
                    values[byte * kPerByte + part] = Add ? values[byte * kPerByte + part] + value : value;
                }
            }
        }
    }
};

// Ids and where their rows go. With offsets, the ids of bag b are those from offsets[b] to offsets[b + 1], and a row goes to each bag.
struct Call {
    uintptr_t ids;
    bool long_ids;
    int64_t num_ids, num_rows, padding;  // padding -1: none
    uintptr_t offsets, weights;          // 0: no bags, no weights
    int64_t num_bags;
    bool mean;
    uintptr_t out;
    int64_t width, stride;  // stride: floats from one row of `out` to the next
    uintptr_t decoded = 0;  // the first rows of the table, as they are answered
    int64_t num_decoded = 0;

    Call(uintptr_t ids, bool long_ids, int64_t num_ids, int64_t num_rows, int64_t padding, uintptr_t offsets, uintptr_t weights, int64_t num_bags,
         bool mean, uintptr_t out, int64_t width, int64_t stride)
        : ids(ids), long_ids(long_ids), num_ids(num_ids), num_rows(num_rows), padding(padding), offsets(offsets), weights(weights),
          num_bags(num_bags), mean(mean), out(out), width(width), stride(stride) {}

    // Have ids below `count` copied from rows, not read; without bags.
    void copy_first(uintptr_t rows, int64_t count) {
        decoded = rows;
        num_decoded = count;
    }
};

// Where the rows of ids lie that were read a moment ago: a batch of a log has some ids many times, and those have the most words.
template <bool Used>
struct Seen {
    INLINE const float* find(int64_t) const { return nullptr; }
    INLINE void put(int64_t, const float*) {}
};

template <>
struct Seen<true> {
    static constexpr int kBits = 9;
    int64_t ids[1 << kBits];
    const float* rows[1 << kBits];

    Seen() { std::fill(std::begin(ids), std::end(ids), int64_t{-1}); }

    static INLINE uint64_t slot(int64_t id) { return uint64_t(id) * 0x9E3779B97F4A7C15u >> (64 - kBits); }

    INLINE const float* find(int64_t id) const { return ids[slot(id)] == id ? rows[slot(id)] : nullptr; }

    INLINE void put(int64_t id, const float* row) {
        ids[slot(id)] = id;
        rows[slot(id)] = row;
    }
};

template <class Id, class Reader>
INLINE int64_t read_rows(const Call& call, const Reader& reader, int64_t begin, int64_t end) {
    const Id* ids = reinterpret_cast<const Id*>(call.ids);
    const float* decoded = reinterpret_cast<const float*>(call.decoded);
    float* out = reinterpret_cast<float*>(call.out);
    Seen<std::is_same<Reader, Levels>::value> seen;
    for (int64_t place = begin; place < end; ++place) {
        const int64_t id = ids[place];
        if (uint64_t(id) >= uint64_t(call.num_rows)) return place;
        if (place + kAhead < call.num_ids && uint64_t(ids[place + kAhead]) < uint64_t(call.num_rows)) {
            const int64_t later = ids[place + kAhead];
            if (later >= call.num_decoded) reader.prefetch(later);
        }
        float* row = out + place * call.stride;
        if (id < call.num_decoded) {
            std::memcpy(row, decoded + id * call.width, call.width * sizeof(float));
            continue;
        }
        if (const float* same = seen.find(id)) {
            std::memcpy(row, same, call.width * sizeof(float));
        } else if (id == call.padding) {
            std::fill(row, row + call.width, 0.0f);
        } else {
            reader.template read<false>(id, 1.0f, row);
        }
        seen.put(id, row);
    }
    return kFine;
}

template <class Id, class Reader>
INLINE int64_t read_bags(const Call& call, const Reader& reader, int64_t begin, int64_t end) {
    const Id* ids = reinterpret_cast<const Id*>(call.ids);
    const int64_t* offsets = reinterpret_cast<const int64_t*>(call.offsets);
    const float* weights = reinterpret_cast<const float*>(call.weights);
    const int64_t last = offsets[end];
    for (int64_t bag = begin; bag < end; ++bag) {
        float* row = reinterpret_cast<float*>(call.out) + bag * call.stride;
        std::fill(row, row + call.width, 0.0f);
        int64_t counted = 0;
        for (int64_t place = offsets[bag]; place < offsets[bag + 1]; ++place) {
            const int64_t id = ids[place];
            if (uint64_t(id) >= uint64_t(call.num_rows)) return place;
            if (place + kAhead < last && uint64_t(ids[place + kAhead]) < uint64_t(call.num_rows)) reader.prefetch(ids[place + kAhead]);
            if (id == call.padding) continue;
            reader.template read<true>(id, weights ? weights[place] : 1.0f, row);
            ++counted;
        }
        for (int64_t column = 0; call.mean && column < call.width; ++column) row[column] /= std::max<int64_t>(counted, 1);
    }
    return kFine;
}

// Whether bags lie one after the other within the ids.
bool bags_fit(const Call& call) {
    const int64_t* offsets = reinterpret_cast<const int64_t*>(call.offsets);
    if (offsets[0] != 0 || offsets[call.num_bags] > call.num_ids) return false;
    return std::is_sorted(offsets, offsets + call.num_bags + 1);
}

// Place of an id that is out of range, or kFine.
template <class Reader>
INLINE int64_t read_part(const Call& given, const Reader& shared, int64_t begin, int64_t end) {
    // Copies of its own, which what is written cannot change, for all that the compiler knows.
    const Call call = given;
    const Reader reader = shared;
    if (call.offsets) return call.long_ids ? read_bags<int64_t>(call, reader, begin, end) : read_bags<int32_t>(call, reader, begin, end);
    return call.long_ids ? read_rows<int64_t>(call, reader, begin, end) : read_rows<int32_t>(call, reader, begin, end);
}

// One instance for each instruction set; what is inlined into it is compiled for that set.
FOR_EACH_CPU int64_t part(const Call& call, const Concat& reader, int64_t begin, int64_t end) { return read_part(call, reader, begin, end); }
FOR_EACH_CPU int64_t part(const Call& call, const Sum& reader, int64_t begin, int64_t end) { return read_part(call, reader, begin, end); }
FOR_EACH_CPU int64_t part(const Call& call, const ByteSum& reader, int64_t begin, int64_t end) { return read_part(call, reader, begin, end); }
FOR_EACH_CPU int64_t part(const Call& call, const Levels& reader, int64_t begin, int64_t end) { return read_part(call, reader, begin, end); }
FOR_EACH_CPU int64_t part(const Call& call, const Scaled<8>& reader, int64_t begin, int64_t end) { return read_part(call, reader, begin, end); }
FOR_EACH_CPU int64_t part(const Call& call, const Scaled<4>& reader, int64_t begin, int64_t end) { return read_part(call, reader, begin, end); }
FOR_EACH_CPU int64_t part(const Call& call, const Scaled<2>& reader, int64_t begin, int64_t end) { return read_part(call, reader, begin, end); }

// Whether this process was forked: GNU's OpenMP then waits for threads that stayed with the parent.
std::atomic<bool> is_fork{false};

// Calls work(begin, end) for equal parts of [0, count), one a thread. With OpenMP they are the threads that torch works with: it has the same
// library loaded by then, and threads of our own would have to wait for its idle ones, which spin for a while after each call of torch.
template <class Work>
void share(int64_t count, int64_t num_threads, const Work& work) {
#ifdef _OPENMP
    if (num_threads == 1 || is_fork) return work(0, count);
#pragma omp parallel num_threads(static_cast<int>(num_threads))
    work(count * omp_get_thread_num() / omp_get_num_threads(), count * (omp_get_thread_num() + 1) / omp_get_num_threads());
#else
    std::vector<std::thread> threads;
    for (int64_t thread = 1; thread < num_threads; ++thread) {
        const auto task = [&work, count, thread, num_threads] { work(count * thread / num_threads, count * (thread + 1) / num_threads); };
        try {
            threads.emplace_back(task);
        } catch (const std::system_error&) {  // the system gives no more threads
            task();
        }
    }
    work(0, count / std::max<int64_t>(num_threads, 1));
    for (std::thread& thread : threads) thread.join();
#endif
}

// A call with the table that answers it.
struct Read {
    Call call;
    std::variant<Concat, Sum, ByteSum, Levels, Scaled<8>, Scaled<4>, Scaled<2>> reader;
    std::vector<float> room = {};  // of `reader`

    int64_t prepare() {
        if (call.offsets && !bags_fit(call)) return kBadOffsets;
        Levels* levels = std::get_if<Levels>(&reader);
        return !levels || levels->prepare(call.num_ids, room) ? kFine : kBadBorders;
    }

    int64_t count() const { return call.offsets ? call.num_bags : call.num_ids; }
};

// Answers calls of equally many ids, or one call of any kind: kFine, a fault, or the place of an id out of range, those of the second call after
// all of the first.
int64_t run(const std::vector<Read*>& reads, int64_t num_threads) {
    int64_t num_values = 0;
    for (Read* read : reads) {
        if (const int64_t fault = read->prepare(); fault != kFine) return fault;
        num_values += read->call.num_ids * read->call.width;
    }
    const int64_t count = reads[0]->count();
    std::atomic<int64_t> bad{kFine};
    share(count, std::clamp<int64_t>(std::min(num_values / kValuesPerThread, count), 1, std::max<int64_t>(num_threads, 1)), [&](int64_t begin, int64_t end) {
        for (size_t number = 0; number < reads.size(); ++number) {
            const Call& call = reads[number]->call;
            const int64_t found = std::visit([&](const auto& reader) { return part(call, reader, begin, end); }, reads[number]->reader);
            if (found >= 0) bad = int64_t(number) * call.num_ids + found;
        }
    });
    return bad;
}

template <class Pointer>
Pointer at(uintptr_t address) {
    return reinterpret_cast<Pointer>(address);
}

// Gradients of code books: each gets the gradient of every row that has one of its words. Books are shared among threads.
FOR_EACH_CPU void add_gradients(const int64_t* ids, int64_t num_ids, int64_t padding, const float* grad, const Codes& codes, float* out, int64_t num_books,
                                int64_t num_words, int64_t width, int64_t row_width, bool side_by_side, int64_t begin, int64_t end) {
    for (int64_t place = 0; place < num_ids; ++place) {
        if (ids[place] == padding) continue;
        if (place + kAhead < num_ids) codes.prefetch(ids[place + kAhead] * num_books, num_books);
        for (int64_t book = begin; book < end; ++book) {
            const int64_t code = std::min<int64_t>(codes.at(ids[place] * num_books + book), num_words - 1);
            put<true>(out + (book * num_words + code) * width, grad + place * row_width + (side_by_side ? book * width : 0), 1.0f, width);
        }
    }
}

// Where the ids of a batch are looked up in one of several tables whose rows are sums of words.
struct Lookup {
    Codes codes;
    int64_t num_books, num_words, first_word, num_rows, padding;
    const int64_t* ids = nullptr;

    Lookup(uintptr_t codes, int64_t nbytes, int64_t bits, int64_t num_books, int64_t num_words, int64_t first_word, int64_t num_rows, int64_t padding)
        : codes{reinterpret_cast<const uint8_t*>(codes), nbytes, bits}, num_books(num_books), num_words(num_words), first_word(first_word),
          num_rows(num_rows), padding(padding) {}

    INLINE bool has(int64_t id) const { return uint64_t(id) < uint64_t(num_rows); }
};

// The words of all tables, kTile columns at a time: (width / kTile rounded up, num_words, kTile), the last word zeros.
struct Tiles {
    const float* values;
    int64_t num_words, width;
};

// Places of the words of rows from `first` on, (rows, words_of_row), for those of them that are `begin` to `end`; kFine, or as `run` tells of an id
// out of range.
FOR_EACH_CPU int64_t find_words(const std::vector<Lookup>& lookups, const Tiles& tiles, int64_t num_ids, int32_t* words, int64_t words_of_row, int64_t first,
                                int64_t begin, int64_t end) {
    for (const Lookup& lookup : lookups) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t place = first + row, id = lookup.ids[place];
            if (!lookup.has(id)) return (&lookup - &lookups[0]) * num_ids + place;
            if (place + kAhead < num_ids && lookup.has(lookup.ids[place + kAhead])) {
                lookup.codes.prefetch(lookup.ids[place + kAhead] * lookup.num_books, lookup.num_books);
            }
            for (int64_t book = 0; book < lookup.num_books; ++book) {
                const int64_t code = std::min<int64_t>(lookup.codes.at(id * lookup.num_books + book), lookup.num_words - 1);
                const int64_t word = id == lookup.padding ? tiles.num_words - 1 : lookup.first_word + book * lookup.num_words + code;
                words[row * words_of_row + book] = int32_t(word);
            }
        }
        words += lookup.num_books;
    }
    return kFine;
}

// out += the sums of words, of one tile and the rows `begin` to `end`. A tile is small enough for the cache of a core, and used for all rows before the next.
FOR_EACH_CPU void add_words(const Tiles& tiles, int64_t number, const int32_t* words, int64_t words_of_row, float* out, int64_t begin, int64_t end) {
    const int64_t column = kTile * number;
    const float* tile = tiles.values + column * tiles.num_words;
    if ((end - begin) * words_of_row > tiles.num_words) {
        for (int64_t word = 0; word < tiles.num_words; ++word) __builtin_prefetch(tile + word * kTile, 0, 2);
    }
    for (int64_t row = begin; row < end; ++row) {
        const int32_t* of_row = words + row * words_of_row;
        float* values = out + row * tiles.width + column;
        __builtin_prefetch(values + kRowsAhead * tiles.width, 1);
        Eight low = {}, high = {};
        int64_t word = 0;
        for (; word + 4 <= words_of_row; word += 4) {
            const float *first = tile + of_row[word] * kTile, *second = tile + of_row[word + 1] * kTile;
            const float *third = tile + of_row[word + 2] * kTile, *fourth = tile + of_row[word + 3] * kTile;
            low += (eight(first) + eight(second)) + (eight(third) + eight(fourth));
            high += (eight(first + 8) + eight(second + 8)) + (eight(third + 8) + eight(fourth + 8));
        }
        for (; word < words_of_row; ++word) {
            low += eight(tile + of_row[word] * kTile);
            high += eight(tile + of_row[word] * kTile + 8);
        }
        if (column + kTile <= tiles.width) {
            eight(values) += low;
            eight(values + 8) += high;
        } else {
            const Eight sums[2] = {low, high};
            for (int64_t place = 0; place < tiles.width - column; ++place) values[place] += sums[place / 8][place % 8];
        }
    }
}

// out += the sums of the words that ids of a place stand for; kFine, or as `run` tells of an id out of range.
int64_t add_sums(const std::vector<Lookup>& lookups, const Tiles& tiles, int64_t num_ids, float* out, int64_t num_threads) {
    int64_t words_of_row = 0;
    for (const Lookup& lookup : lookups) words_of_row += lookup.num_books;
    const std::unique_ptr<int32_t[]> words(new int32_t[words_of_row * std::min(kRowsOfTile, num_ids)]);
    const int64_t num_tiles = (tiles.width + kTile - 1) / kTile;
    std::atomic<int64_t> bad{kFine};
    for (int64_t first = 0; first < num_ids; first += kRowsOfTile) {
        const int64_t num_rows = std::min(kRowsOfTile, num_ids - first);
        const int64_t useful = std::clamp<int64_t>(num_rows * words_of_row * tiles.width / kValuesPerThread, 1, std::max<int64_t>(num_threads, 1));
        share(num_rows, std::min(useful, num_rows), [&](int64_t begin, int64_t end) {
            const int64_t found = find_words(lookups, tiles, num_ids, words.get(), words_of_row, first, begin, end);
            if (found != kFine) bad = found;
        });
        if (bad != kFine) break;
        const int64_t parts = std::min((useful + num_tiles - 1) / num_tiles, num_rows);  // of the rows, where there are more threads than tiles
        share(num_tiles * parts, std::min(useful, num_tiles * parts), [&](int64_t begin, int64_t end) {
            for (int64_t piece = begin; piece < end; ++piece) {
                const int64_t part = piece % parts;
                add_words(tiles, piece / parts, words.get(), words_of_row, out + first * tiles.width, num_rows * part / parts, num_rows * (part + 1) / parts);
            }
        });
    }
    return bad;
}

}  // namespace

NB_MODULE(_kernel, m) {
#ifdef _OPENMP
    pthread_atfork(nullptr, nullptr, [] { is_fork = true; });
#endif
    nb::class_<Call>(m, "Call")
        .def(nb::init<uintptr_t, bool, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, int64_t, bool, uintptr_t, int64_t, int64_t>())
        .def("copy_first", &Call::copy_first);
    nb::class_<Read>(m, "Read");
    m.def("concat", [](const Call& call, uintptr_t codes, int64_t nbytes, int64_t bits, uintptr_t books, int64_t num_books, int64_t num_words) {
        return Read{call, Concat{{{at<const uint8_t*>(codes), nbytes, bits}, at<const float*>(books), num_books, num_words, call.width / num_books}}};
    });
    m.def("sum", [](const Call& call, uintptr_t codes, int64_t nbytes, int64_t bits, uintptr_t books, int64_t num_books, int64_t num_words) {
        return Read{call, Sum{{{at<const uint8_t*>(codes), nbytes, bits}, at<const float*>(books), num_books, num_words, call.width}}};
    });
    m.def("byte_sum", [](const Call& call, uintptr_t codes, int64_t nbytes, int64_t bits, uintptr_t books, int64_t num_books, int64_t num_words, uintptr_t scales) {
        return Read{call, ByteSum{{{at<const uint8_t*>(codes), nbytes, bits}, at<const int8_t*>(books), num_books, num_words, call.width}, at<const float*>(scales)}};
    });
    m.def("levels", [](const Call& call, uintptr_t codes, int64_t nbytes, int64_t bits, uintptr_t ranks, int64_t ranks_nbytes, int64_t rank_bits,
                       uintptr_t mean, uintptr_t borders, int64_t num_levels, uintptr_t words, uintptr_t scales, int64_t num_words) {
        return Read{call, Levels{{at<const uint8_t*>(codes), nbytes, bits}, {at<const uint8_t*>(ranks), ranks_nbytes, rank_bits}, at<const float*>(mean),
                                 at<const int64_t*>(borders), at<const uint8_t*>(words), at<const uint16_t*>(scales), num_levels, num_words, call.width,
                                 call.num_rows}};
    });
    m.def("scaled", [](const Call& call, uintptr_t codes, int64_t bits, uintptr_t scales, int64_t group, int64_t num_groups) {
        const auto* bytes = at<const uint8_t*>(codes);
        const auto* halves = at<const uint16_t*>(scales);
        if (bits == 8) return Read{call, Scaled<8>{bytes, halves, call.width, group, num_groups}};
        if (bits == 4) return Read{call, Scaled<4>{bytes, halves, call.width, group, num_groups}};
        return Read{call, Scaled<2>{bytes, halves, call.width, group, num_groups}};
    });
    m.def("run", [](Read& read, int64_t num_threads) {
        nb::gil_scoped_release release;
        return run({&read}, num_threads);
    });
    // Of copies, since other threads may be using `reads`; `out` of each is how far from the first its place is.
    m.def("run_side_by_side", [](const std::vector<Read*>& reads, const std::vector<uintptr_t>& ids, int64_t num_ids, uintptr_t out, int64_t num_threads) {
        nb::gil_scoped_release release;
        std::vector<Read> own;
        std::vector<Read*> each;
        own.reserve(reads.size());
        for (size_t number = 0; number < reads.size(); ++number) {
            Read& read = own.emplace_back(*reads[number]);
            read.call.ids = ids.at(number);
            read.call.num_ids = num_ids;
            read.call.out += out;
            each.push_back(&read);
        }
        return run(each, num_threads);
    });
    nb::class_<Lookup>(m, "Lookup").def(nb::init<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>());
    m.def("add_sums", [](const std::vector<const Lookup*>& given, const std::vector<uintptr_t>& ids, int64_t num_ids, uintptr_t tiles, int64_t num_words,
                         int64_t width, uintptr_t out, int64_t num_threads) {
        nb::gil_scoped_release release;
        std::vector<Lookup> lookups;
        for (size_t number = 0; number < given.size(); ++number) lookups.emplace_back(*given[number]).ids = at<const int64_t*>(ids.at(number));
        return add_sums(lookups, {at<const float*>(tiles), num_words, width}, num_ids, at<float*>(out), num_threads);
    });
    m.def("gradients", [](uintptr_t ids, int64_t num_ids, int64_t padding, uintptr_t grad, int64_t row_width, uintptr_t codes, int64_t nbytes,
                          int64_t bits, uintptr_t out, int64_t num_books, int64_t num_words, int64_t width, bool side_by_side, int64_t num_threads) {
        nb::gil_scoped_release release;
        const int64_t useful = num_ids * row_width / kValuesPerThread;
        share(num_books, std::clamp<int64_t>(std::min({useful, num_books, num_threads}), 1, num_books), [&](int64_t begin, int64_t end) {
            add_gradients(at<const int64_t*>(ids), num_ids, padding, at<const float*>(grad), {at<const uint8_t*>(codes), nbytes, bits}, at<float*>(out),
                          num_books, num_words, width, row_width, side_by_side, begin, end);
        });
    });
}
