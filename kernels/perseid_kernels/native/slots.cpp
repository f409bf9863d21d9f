// K and V that move to other slots of their caches (contract in backend.py: SlotMoves).
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "threads.h"

namespace perseid {
namespace {

constexpr int64_t TASK_ELEMENTS = 1 << 15;  // fewer are moved by the caller: handing over costs more

}  // namespace

PERSEID_OP void perseid_move_slots(
    float* const* caches, int64_t num_caches, int64_t width, const int64_t* sources, const int64_t* targets,
    int64_t num_moves) {
    const int64_t of_task = std::max<int64_t>(1, TASK_ELEMENTS / std::max<int64_t>(1, num_moves * width));
    parallel_for((num_caches + of_task - 1) / of_task, [&](int64_t task) {
        for (int64_t i = task * of_task; i < std::min(num_caches, (task + 1) * of_task); ++i) {
            for (int64_t move = 0; move < num_moves; ++move) {
                std::memcpy(caches[i] + targets[move] * width, caches[i] + sources[move] * width, width * sizeof(float));
            }
        }
    });
}

}  // namespace perseid
