# SPDX-License-Identifier: MIT
"""Names of all faults, with a sentence on each. docs/ptx.md and docs/graphs.md say what to do."""

NAMES = {
    # Of kernels.
    "out of bounds": "A thread reads or writes outside of a tensor.",
    "misaligned access": "An address is no multiple of the bytes that are accessed.",
    "uninitialised memory": "A value that nobody has written is stored, is a part of an address, "
    "or decides what is executed.",
    "uninitialised register": "A thread uses a register that no instruction has written.",
    "undefined value": "A thread uses a register that was written for other threads only.",
    "race": "Two warps access the same memory, one of them writes, and no barrier is between them.",
    "race within a warp": "Two threads of a warp access the same memory, one of them writes, and "
    "nothing orders them.",
    "race between programs": "Two programs access one element, one of them writes, and no atomic "
    "orders them.",
    "race between blocks": "Two blocks access one element, one of them writes, and no atomic "
    "orders them.",
    "race between launches": "A kernel does not wait for the launch before it, whose memory it "
    "accesses.",
    "wrong mask": "The mask of a shuffle, a vote or a barrier does not name the threads that "
    "execute it.",
    "divergent barrier": "Not all threads of a block reach a barrier.",
    "different values": "Threads store different values to one element.",
    "missing fence": "TMA or a tensor core reads what threads have written, without a fence.",
    "ended CTA": "The shared memory of a CTA is accessed after the CTA has ended.",
    "deadlock": "Warps or programs wait for what nobody will do.",
    "endless loop": "A warp executes more than three million instructions.",
    "assertion": "An assertion of the kernel fails.",
    "false assumption": "An assumption of tl.assume is false.",
    "refused by ptxas": "ptxas does not assemble the kernel.",
    "no allocator": "The kernel needs memory of an allocator, and nobody has set one.",
    "configuration left out": "An autotuned kernel does not fit with a configuration.",
    "failed configuration": "An autotuned kernel raises an error with a configuration.",
    "tuned in place": "Timing the configurations of an autotuned kernel changes its result.",
    "diverged warp": "A part of a warp executes what all threads must execute together.",
    "unfinished copy": "A program may end before an asynchronous copy has.",
    "overwritten mbarrier": "A program overwrites what counts asynchronous copies.",
    "invalid operation": "The kernel does what PTX does not allow.",
    "trap": "The kernel has ended itself.",
    "unknown instruction": "The executor does not know an instruction.",
    "error of the executor": "The executor itself fails.",
    "many errors": "A launch of CUDA C++ has ended after many errors.",
    "too large": "A launch takes more time or memory than it may take.",
    # Of programs around kernels of numba.cuda.
    "a kernel of numba.cuda": "numba.cuda finds no GPU.",
    "not executed": "A kernel of numba.cuda is of a kind that is not executed.",
    "launch failure": "A launch of numba.cuda that no GPU accepts.",
    # Of programs around CUDA graphs.
    "read-back in a capture": "The program reads values of the device within a capture.",
    "host's copy in a capture": "A tensor is copied from the host within a capture.",
    "wait in a capture": "The program waits for the device within a capture.",
    "optimizer that is not capturable": "An optimizer in a capture counts its steps on the host.",
    "seed in a capture": "A seed is set within a capture.",
    "unregistered generator": "A capture draws from a generator that the graph does not know.",
    "unjoined work": "A capture ends before another stream that began work within it.",
    "work that is not captured": "Work within a capture is on a stream outside of it.",
    "empty graph": "Nothing on the device was captured.",
    "stale stream in a capture": "A captured backward pass runs nodes of the default stream.",
    "state made in a capture": "An optimizer makes its state within a capture.",
    "result before a replay": "A result of a graph is read before a replay has computed it.",
    "freed input": "A graph uses memory of a tensor that has been freed.",
    "replaced gradient": "A graph writes gradients to memory that the parameters no longer have.",
    "ignored gradient": "A replay overwrites a gradient that no optimizer has taken.",
    "overwritten gradient": "A replay overwrites the gradient to which it should add.",
    "number in a graph": "A graph has a number of Python that has changed since.",
    "host's values in a graph": "A graph has values of a tensor on the host that have changed.",
    "host's work in a capture": "A capture changes a tensor on the host, and replays do not.",
    "invalid value in a replay": "An operand of a replay has a value that its operator does not "
    "take.",
    "overwritten result": "A result is read after another graph has overwritten it.",
    "result of a reset graph": "A result is read after its graph was reset.",
    "missing wait": "Two streams access the same memory without an order.",
}
