// What the engine asks of the pool of results beside fcomm.h.
#pragma once

namespace fcomm {

// Whether that is the start of a block that the pool has handed out.
bool pool_holds(const void *block);

// Never use this block again: when it comes back its memory goes to the system, and its addresses to nobody.
void pool_abandon(void *block);

}  // namespace fcomm
