//! The receive buffers that the kernel picks from: a ring of entries shared with it, and the memory
//! they point to (io_uring_register_buf_ring(3), kernel-notes/recv-and-provided-buffers.md).
//!
//! ```text
//!            head (kernel's)          tail (ours)
//!              v                        v
//!   entries  [ . | 7 | 2 | 0 | 5 | 1 | . | . ]      an entry: address, length, buffer id
//! ```
//!
//! A buffer is given away in order of the ring, comes back with a completion that names its id, is
//! read in place, and returned. Nothing here makes a system call, so the logic runs on plain memory in tests.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    ptr::NonNull,
    sync::atomic::{AtomicU16, Ordering},
};

use io_uring::types::BufRingEntry;

/// The kernel wants the ring of entries aligned to a page.
const PAGE_BYTES: usize = 4096;

/// A power of two of equal buffers, and the ring through which they are given to the kernel.
pub struct Buffers {
    entries: NonNull<BufRingEntry>,
    memory: NonNull<u8>,
    count: u16,
    buffer_bytes: usize,
    /// Where the next buffer is put; only its low bits are an index. Published by [`Buffers::publish`].
    tail: u16,
}

impl Buffers {
    /// All buffers are in the ring from the start.
    pub fn new(count: u16, buffer_bytes: usize) -> Buffers {
        assert!(count.is_power_of_two() && buffer_bytes > 0);
        let mut buffers = Buffers {
            entries: allocate(Buffers::entries_layout(count)).cast(),
            memory: allocate(Buffers::memory_layout(count, buffer_bytes)),
            count,
            buffer_bytes,
            tail: 0,
        };
        (0..count).for_each(|id| buffers.give_back(id));
        buffers.publish();
        buffers
    }

    /// Address of the entries, for the registration.
    pub fn address(&self) -> u64 {
        self.entries.as_ptr() as u64
    }

    pub fn count(&self) -> u16 {
        self.count
    }

    /// The first `length` bytes of a buffer that a completion named.
    ///
    /// # Safety
    /// - The kernel has handed out `id` and it has not been given back since.
    /// - The slice is dropped before [`Buffers::give_back`] of the same id.
    pub unsafe fn bytes<'a>(&self, id: u16, length: usize) -> &'a [u8] {
        assert!(id < self.count && length <= self.buffer_bytes);
        // SAFETY: in bounds by the assertion; nobody writes it while the caller has it (the conditions above).
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(usize::from(id) * self.buffer_bytes), length) }
    }

    /// Puts a buffer back. The kernel sees it after the next [`Buffers::publish`].
    pub fn give_back(&mut self, id: u16) {
        assert!(id < self.count);
        let index = usize::from(self.tail & (self.count - 1));
        // SAFETY: `index` and `id` are below `count`, so both pointers stay inside what `new`
        // allocated. The kernel does not look at this entry before the tail passes it. Field by field on
        // purpose: the tail shares memory with the last two bytes of entry 0 (struct io_uring_buf_ring).
        unsafe {
            let entry = &mut *self.entries.as_ptr().add(index);
            entry.set_addr(self.memory.as_ptr().add(usize::from(id) * self.buffer_bytes) as u64);
            entry.set_len(self.buffer_bytes as u32);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    /// Shows the kernel everything given back since the last time: once per turn, not per buffer.
    pub fn publish(&mut self) {
        // SAFETY: the tail is inside entry 0, which `new` allocated; the kernel only reads it.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(self.entries.as_ptr()).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    fn entries_layout(count: u16) -> Layout {
        Layout::from_size_align(usize::from(count) * size_of::<BufRingEntry>(), PAGE_BYTES).expect("a small size")
    }

    fn memory_layout(count: u16, buffer_bytes: usize) -> Layout {
        Layout::from_size_align(usize::from(count) * buffer_bytes, PAGE_BYTES).expect("a size below 4 GiB")
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with these layouts. The driver drops its ring first, which ends the
        // registration, after it has seen every receive come to its end.
        unsafe {
            dealloc(self.entries.as_ptr().cast(), Buffers::entries_layout(self.count));
            dealloc(self.memory.as_ptr(), Buffers::memory_layout(self.count, self.buffer_bytes));
        }
    }
}

fn allocate(layout: Layout) -> NonNull<u8> {
    assert!(layout.size() > 0);
    // SAFETY: the size is not zero.
    NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would see: the published tail, and the id in each entry.
    fn ids(buffers: &Buffers) -> (u16, Vec<u16>) {
        // SAFETY: the entries live as long as `buffers`, and this test is the only one to look.
        unsafe {
            let tail = *BufRingEntry::tail(buffers.entries.as_ptr());
            let entry = |index: u16| (*buffers.entries.as_ptr().add(usize::from(index))).bid();
            (tail, (0..buffers.count).map(entry).collect())
        }
    }

    #[test]
    fn recycling_every_buffer_leaves_the_tail_intact() {
        let mut buffers = Buffers::new(8, 64);
        assert_eq!(ids(&buffers), (8, (0..8).collect()));
        (0..8).rev().for_each(|id| buffers.give_back(id));
        assert_eq!(ids(&buffers).0, 8, "not published yet");
        buffers.publish();
        assert_eq!(ids(&buffers), (16, (0..8).rev().collect()));
    }

    #[test]
    fn the_tail_wraps_around_at_65536() {
        let mut buffers = Buffers::new(2, 16);
        for _ in 0..40_000 {
            buffers.give_back(1);
            buffers.give_back(0);
        }
        buffers.publish();
        assert_eq!(ids(&buffers), ((80_002 % 65_536) as u16, vec![1, 0]));
    }

    #[test]
    fn buffers_do_not_overlap() {
        let buffers = Buffers::new(4, 32);
        let start = |id| {
            // SAFETY: no kernel is involved; nobody writes.
            unsafe { buffers.bytes(id, 32) }.as_ptr() as usize
        };
        assert!((0..3).all(|id| start(id) + 32 == start(id + 1)));
    }
}
