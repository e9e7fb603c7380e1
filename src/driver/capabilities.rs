//! What this kernel's io_uring can do, found out by trying, never by its version number.
//!
//! Vendors carry features back and forth between versions (5.10.162 has the io_uring of 5.15), so
//! only the kernel itself can say. [`Capabilities::probe`] asks it once per process; every path
//! in `uring.rs` looks here and nowhere else. `URINGD_IO_MASK` takes features away again, so that one machine
//! can play every older one: `tier=5.15`, or names with a minus, `-multishot_recv,-buffer_ring`.
//!
//! kernel-notes/setup-flags.md and kernel-notes/disabled-and-seccomp.md have the facts.

use std::{
    fmt, fs, io,
    os::fd::{FromRawFd, OwnedFd},
    thread,
};

use io_uring::{IoUring, Probe, opcode, types};

/// What the uring driver may use. Each field is one decision in `uring.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// IORING_REGISTER_PBUF_RING (5.19): receives take their buffer when data is there.
    pub buffer_ring: bool,
    /// IORING_RECV_MULTISHOT (6.0; needs `buffer_ring`).
    pub multishot_recv: bool,
    /// IORING_ACCEPT_MULTISHOT (5.19).
    pub multishot_accept: bool,
    /// IORING_SETUP_COOP_TASKRUN and TASKRUN_FLAG (5.19): completions do not interrupt the thread.
    pub coop_taskrun: bool,
    /// IORING_SETUP_SINGLE_ISSUER (6.0).
    pub single_issuer: bool,
    /// IORING_SETUP_DEFER_TASKRUN (6.1; needs `single_issuer`): completions are worked off in io_uring_enter(2) only.
    pub defer_taskrun: bool,
    /// IORING_SETUP_SUBMIT_ALL (5.18): one bad entry does not stop the batch.
    pub submit_all: bool,
    /// IORING_SETUP_NO_SQARRAY (6.6): one indirection less.
    pub no_sqarray: bool,
    /// IORING_FEAT_MIN_TIMEOUT (6.12). Only names the tier; not used.
    pub min_timeout: bool,
}

/// The environment variable that takes features away.
pub const MASK_VARIABLE: &str = "URINGD_IO_MASK";

/// One row per feature: its name in the mask, the tier it came with (major, minor), and its field.
type Row = (&'static str, (u32, u32), fn(&mut Capabilities) -> &mut bool);

const ROWS: [Row; 9] = [
    ("submit_all", (5, 18), |c| &mut c.submit_all),
    ("buffer_ring", (5, 19), |c| &mut c.buffer_ring),
    ("multishot_accept", (5, 19), |c| &mut c.multishot_accept),
    ("coop_taskrun", (5, 19), |c| &mut c.coop_taskrun),
    ("single_issuer", (6, 0), |c| &mut c.single_issuer),
    ("multishot_recv", (6, 0), |c| &mut c.multishot_recv),
    ("defer_taskrun", (6, 1), |c| &mut c.defer_taskrun),
    ("no_sqarray", (6, 6), |c| &mut c.no_sqarray),
    ("min_timeout", (6, 12), |c| &mut c.min_timeout),
];

impl Capabilities {
    /// Asks the kernel, on a thread of its own: when a ring is closed, the kernel interrupts whoever made it some
    /// time later (io_ring_exit_work, TWA_SIGNAL), and a recv(2) with a timeout then fails with EINTR though no
    /// signal came. The caller's thread is not ours to interrupt.
    ///
    /// # Errors
    /// [`Unavailable`] says why there is no io_uring to use, and what to do about it.
    pub fn probe() -> Result<Capabilities, Unavailable> {
        apart(Capabilities::probe_here)
    }

    fn probe_here() -> Result<Capabilities, Unavailable> {
        let ring = IoUring::new(8).map_err(|error| Unavailable::setup(&error))?;
        let features = ring.params();
        if !(features.is_feature_fast_poll() && features.is_feature_nodrop() && features.is_feature_ext_arg()) {
            return Err(Unavailable::TooOld);
        }
        let mut operations = Probe::new();
        ring.submitter().register_probe(&mut operations).map_err(|_| Unavailable::TooOld)?;
        // Flags of an operation cannot be probed; an operation that came with the same release can.
        let since_5_19 = operations.is_supported(opcode::Socket::CODE);
        let since_6_0 = operations.is_supported(opcode::SendZc::CODE);
        let accepts = |setup: &mut io_uring::Builder| setup.build(8).is_ok();
        let buffer_ring = since_5_19 && registers_buffer_ring(&ring);
        let single_issuer = accepts(IoUring::builder().setup_single_issuer());
        Ok(Capabilities {
            buffer_ring,
            multishot_recv: buffer_ring && since_6_0,
            multishot_accept: since_5_19,
            coop_taskrun: accepts(IoUring::builder().setup_coop_taskrun().setup_taskrun_flag()),
            single_issuer,
            defer_taskrun: accepts(IoUring::builder().setup_single_issuer().setup_defer_taskrun()),
            submit_all: accepts(IoUring::builder().setup_submit_all()),
            no_sqarray: accepts(IoUring::builder().setup_no_sqarray()),
            min_timeout: features.is_feature_min_timeout(),
        })
    }

    /// Takes away what `mask` names: `tier=MAJOR.MINOR`, or features with a minus, comma-separated.
    ///
    /// # Errors
    /// A sentence, when a name is unknown.
    pub fn masked(mut self, mask: &str) -> Result<Capabilities, String> {
        for word in mask.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            if let Some(tier) = word.strip_prefix("tier=") {
                let number = |text: &str| text.parse::<u32>().ok();
                let tier = tier.split_once('.').and_then(|(major, minor)| Some((number(major)?, number(minor)?)));
                let tier = tier.ok_or_else(|| format!("{MASK_VARIABLE}: {word:?} should be like tier=6.1"))?;
                ROWS.iter().filter(|row| row.1 > tier).for_each(|row| *row.2(&mut self) = false);
            } else {
                let row = word.strip_prefix('-').and_then(|name| ROWS.iter().find(|row| row.0 == name));
                let row = row.ok_or_else(|| {
                    let names: Vec<_> = ROWS.iter().map(|row| row.0).collect();
                    format!("{MASK_VARIABLE}: {word:?} is neither tier=MAJOR.MINOR nor a minus and one of {}", names.join(", "))
                })?;
                *row.2(&mut self) = false;
            }
        }
        self.multishot_recv &= self.buffer_ring;
        self.defer_taskrun &= self.single_issuer;
        Ok(self)
    }

    /// The newest kernel release of which everything is here: `"6.12"`, `"5.15"`, ...
    pub fn tier(&self) -> &'static str {
        let has = |row: &Row| *row.2(&mut self.clone());
        let missing = ROWS.iter().filter(|row| !has(row)).map(|row| row.1).min();
        match missing {
            None => "6.12",
            Some(first) if first > (6, 6) => "6.6",
            Some(first) if first > (6, 1) => "6.1",
            Some(first) if first > (6, 0) => "6.0",
            Some(first) if first > (5, 19) => "5.19",
            Some(_) => "5.15",
        }
    }
}

/// Lists what is there: `buffer_ring multishot_recv -no_sqarray`.
impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, row) in ROWS.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            let minus = if *row.2(&mut self.clone()) { "" } else { "-" };
            write!(f, "{space}{minus}{}", row.0)?;
        }
        Ok(())
    }
}

/// The bits of `io_uring_params.features` as the kernel gives them, for people to look up in io_uring_setup(2).
/// `None` when there is no io_uring to ask.
pub fn feature_bits() -> Option<u32> {
    apart(feature_bits_here)
}

fn feature_bits_here() -> Option<u32> {
    /// struct io_uring_params: 30 words, of which the sixth is `features`.
    const WORDS: usize = 30;
    const FEATURES: usize = 5;
    let mut params = [0u32; WORDS];
    // SAFETY: the kernel reads and writes sizeof(struct io_uring_params), which is `params`; zero asks for a plain ring.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: just opened, and nobody else owns it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Some(params[FEATURES])
}

/// Runs `ask` on a thread that ends with it.
fn apart<T: Send>(ask: fn() -> T) -> T {
    thread::scope(|scope| scope.spawn(ask).join()).expect("nothing that asks the kernel panics")
}

/// Registers a ring of two buffers and takes it back.
fn registers_buffer_ring(ring: &IoUring) -> bool {
    #[repr(C, align(4096))]
    struct Page([u8; 4096]);
    let page = Box::new(Page([0; 4096]));
    let address = page.0.as_ptr() as u64;
    debug_assert!(2 * size_of::<types::BufRingEntry>() <= page.0.len());
    // SAFETY: the page is aligned as the kernel wants it and outlives the registration, which ends below.
    unsafe { ring.submitter().register_buf_ring_with_flags(address, 2, 0, 0).is_ok() && ring.submitter().unregister_buf_ring(0).is_ok() }
}

/// Why io_uring cannot be used here. Its text is one sentence and what to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// `kernel.io_uring_disabled` is 1 or 2 (6.6, and vendors' older kernels).
    Disabled { value: u8 },
    /// EPERM or ENOSYS under a seccomp filter.
    Filtered { errno: i32 },
    /// ENOSYS without a filter: built without CONFIG_IO_URING, or before 5.1.
    Missing,
    /// The kernel's io_uring lacks FAST_POLL, NODROP or EXT_ARG (before 5.10.162 and 5.11).
    TooOld,
    /// ENOMEM: before 5.12 a ring's memory counts against RLIMIT_MEMLOCK.
    Memory,
    /// Any other errno.
    Failed { errno: i32 },
}

impl Unavailable {
    /// Finds the cause of a failed io_uring_setup(2).
    pub fn setup(error: &io::Error) -> Unavailable {
        let sysctl = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let filtered = status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"));
        Unavailable::classify(error.raw_os_error().unwrap_or(0), sysctl.as_deref(), filtered)
    }

    fn classify(errno: i32, sysctl: Option<&str>, filtered: bool) -> Unavailable {
        let disabled = sysctl.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        match errno {
            libc::EPERM if disabled > 0 => Unavailable::Disabled { value: disabled },
            libc::EPERM | libc::ENOSYS if filtered => Unavailable::Filtered { errno },
            libc::ENOSYS => Unavailable::Missing,
            libc::ENOMEM => Unavailable::Memory,
            libc::EINVAL => Unavailable::TooOld,
            errno => Unavailable::Failed { errno },
        }
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unavailable::Disabled { value: 1 } => f.write_str(
                "io_uring is disabled for ordinary users (kernel.io_uring_disabled=1); try: add this user to the \
                 group in kernel.io_uring_group, or sysctl -w kernel.io_uring_disabled=0",
            ),
            Unavailable::Disabled { .. } => {
                f.write_str("io_uring is disabled (kernel.io_uring_disabled=2); try: sysctl -w kernel.io_uring_disabled=0")
            }
            Unavailable::Filtered { errno } => write!(
                f,
                "a seccomp filter forbids io_uring ({}), as the default profiles of Docker and Kubernetes do; try: a \
                 profile that allows io_uring_setup, io_uring_enter and io_uring_register",
                if *errno == libc::EPERM { "EPERM" } else { "ENOSYS" },
            ),
            Unavailable::Missing => f.write_str("this kernel has no io_uring; try: Linux 5.11 or newer with CONFIG_IO_URING"),
            Unavailable::TooOld => f.write_str("this kernel's io_uring is too old; try: Linux 5.10.162, 5.11 or newer"),
            Unavailable::Memory => f.write_str("no memory for a ring; try: ulimit -l unlimited (LimitMEMLOCK=infinity under systemd)"),
            Unavailable::Failed { errno } => {
                write!(f, "io_uring_setup failed: {}; try: --backend epoll", io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

impl std::error::Error for Unavailable {}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Capabilities = Capabilities {
        buffer_ring: true,
        multishot_recv: true,
        multishot_accept: true,
        coop_taskrun: true,
        single_issuer: true,
        defer_taskrun: true,
        submit_all: true,
        no_sqarray: true,
        min_timeout: true,
    };

    #[test]
    fn each_tier_masked_is_the_tier_reported() {
        for tier in ["5.15", "5.19", "6.0", "6.1", "6.6", "6.12"] {
            assert_eq!(ALL.masked(&format!("tier={tier}")).expect("a tier").tier(), tier);
        }
    }

    #[test]
    fn a_feature_taken_away_takes_what_needs_it_along() {
        let caps = ALL.masked("-buffer_ring, -single_issuer").expect("known names");
        assert!(!caps.buffer_ring && !caps.multishot_recv && !caps.single_issuer && !caps.defer_taskrun);
        assert!(caps.multishot_accept && caps.coop_taskrun);
    }

    #[test]
    fn an_unknown_name_in_the_mask_is_refused_with_the_known_ones() {
        let error = ALL.masked("-warp").expect_err("unknown");
        assert!(error.contains("-warp") && error.contains("multishot_recv"), "{error}");
        assert!(ALL.masked("tier=six").is_err());
    }

    #[test]
    fn probing_does_not_interrupt_the_thread_that_asked() {
        let (waiting, _peer) = std::os::unix::net::UnixStream::pair().expect("a pair");
        waiting.set_read_timeout(Some(std::time::Duration::from_millis(20))).expect("a socket");
        for _ in 0..5 {
            let _ = Capabilities::probe();
            let error = io::Read::read(&mut &waiting, &mut [0]).expect_err("nothing was sent");
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn every_cause_of_a_failed_setup_has_its_own_sentence() {
        let causes = [
            (libc::EPERM, Some("2\n"), false, "kernel.io_uring_disabled=2"),
            (libc::EPERM, Some("1\n"), true, "io_uring_group"),
            (libc::EPERM, Some("0\n"), true, "seccomp"),
            (libc::ENOSYS, None, true, "seccomp"),
            (libc::ENOSYS, None, false, "CONFIG_IO_URING"),
            (libc::ENOMEM, Some("0"), false, "ulimit -l"),
            (libc::EINVAL, Some("0"), false, "too old"),
            (libc::EMFILE, Some("0"), false, "epoll"),
        ];
        for (errno, sysctl, filtered, words) in causes {
            let text = Unavailable::classify(errno, sysctl, filtered).to_string();
            assert!(text.contains(words) && text.contains("try:"), "{errno}: {text}");
        }
    }
}
