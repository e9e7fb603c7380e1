//! Whether the calling thread may interrupt others on its CPU when it is woken (sched(7)).
//!
//! A thread of SCHED_BATCH that becomes ready waits for the end of the running one's slice (3 ms at most) when it shares a
//! CPU with it, and runs at once when a CPU is free. Otherwise it is a thread like all others. No privilege is needed for
//! either direction (Linux 2.6.16).

use std::io;

/// # Errors
/// ENOSYS or EPERM, where a seccomp filter forbids it.
pub fn interrupt_others(may: bool) -> io::Result<()> {
    let policy = if may { libc::SCHED_OTHER } else { libc::SCHED_BATCH };
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread; the kernel only reads the parameters, which live until it returns.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_up_interrupting_others_and_takes_it_back() {
        // SAFETY: it takes a number.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        interrupt_others(false).expect("no privilege is needed");
        assert_eq!(policy(), libc::SCHED_BATCH);
        interrupt_others(true).expect("no privilege is needed");
        assert_eq!(policy(), libc::SCHED_OTHER);
    }
}
