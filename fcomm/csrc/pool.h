// What the engine uses of the pool of results, besides fcomm.h.
#pragma once

namespace fcomm {

// Whether it is the start of a block that the pool has handed out.
bool pool_holds(const void *block);

// Never use this block again: when it is returned, its memory goes back to the system, and its addresses stay unused.
void pool_abandon(void *block);

}  // namespace fcomm
