//! `uringd --doctor`: what this machine offers and costs a server, one line per finding, each with its remedy.
//!
//! [`examine`] reads /proc and /sys and asks the kernel; everything that judges a text is a function of that text
//! alone, so that the tests can show it any machine. Nothing is changed, and nothing is needed: what cannot be read is left out.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use rustix::process::{Resource, getrlimit};

use crate::{
    config::{Backend, Config, Cores},
    driver::capabilities::{self, Capabilities, Unavailable},
};

/// Below this many descriptors not even a small server works.
const NOFILE_LEAST: u64 = 256;
/// Descriptors that are not connections.
const NOFILE_RESERVED: u64 = 32;
/// Before 5.12, rings and their buffers are counted against RLIMIT_MEMLOCK; this much is the default there (64 KiB).
const MEMLOCK_LEAST: u64 = 64 << 10;
/// Fewer ports than this are used up by a proxy or a load test that closes its connections: each waits 60 s in TIME_WAIT.
const PORTS_LEAST: u32 = 16_384;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Ok,
    /// It costs something, or will under load.
    Note,
    /// It keeps the server from working as it should.
    Problem,
}

/// One line: what was found, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub level: Level,
    pub what: String,
    /// Empty when there is nothing to do.
    pub remedy: String,
}

impl Finding {
    fn ok(what: impl Into<String>) -> Finding {
        Finding { level: Level::Ok, what: what.into(), remedy: String::new() }
    }

    fn note(what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { level: Level::Note, what: what.into(), remedy: remedy.into() }
    }

    fn problem(what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { level: Level::Problem, what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Problem => "problem",
        };
        write!(f, "{level:<8} {}", self.what)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "; try: {}", self.remedy) }
    }
}

/// Everything that was found, in the order of the text.
#[derive(Clone, Debug)]
pub struct Report(pub Vec<Finding>);

impl Report {
    pub fn has_problem(&self) -> bool {
        self.0.iter().any(|finding| finding.level == Level::Problem)
    }
}

/// A line per finding.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|finding| writeln!(f, "{finding}"))
    }
}

/// Looks at this machine with the eyes of a server that is configured like this.
pub fn examine(config: &Config) -> Report {
    let mut found = vec![kernel(read("/proc/sys/kernel/osrelease").as_deref().unwrap_or("unknown"))];
    found.extend(io_uring(Capabilities::probe(), capabilities::feature_bits(), config.backend));

    let allowed = read("/proc/self/status").and_then(|text| cpus_allowed(&text)).unwrap_or_default();
    let shards = shards(&config.cores, allowed.len());
    let nofile = getrlimit(Resource::Nofile);
    let connections = config.limits.connections_max as u64;
    found.push(descriptors(nofile.current.unwrap_or(u64::MAX), nofile.maximum.unwrap_or(u64::MAX), connections, shards as u64));
    found.push(memlock(getrlimit(Resource::Memlock).current.unwrap_or(u64::MAX)));
    let sysctls: [(&str, Judge<'_>); 4] = [
        ("net/core/somaxconn", &|text| somaxconn(text, config.backlog)),
        ("net/ipv4/ip_local_port_range", &port_range),
        ("net/ipv4/tcp_migrate_req", &migrate_req),
        ("vm/overcommit_memory", &overcommit),
    ];
    found.extend(sysctls.iter().filter_map(|(name, judge)| judge(&read(&format!("/proc/sys/{name}"))?)));

    let online = read("/sys/devices/system/cpu/online").and_then(|text| numbers(&text)).unwrap_or_default();
    found.extend(cpus(&allowed, &online, shards));
    found.extend(quota_of_this_process().map(|quota| cpu_quota(quota, shards)));
    found.extend(read("/sys/devices/system/cpu/smt/active").and_then(|text| smt(&text)));
    found.extend(read("/sys/devices/system/node/online").and_then(|text| numa(&text)));
    found.push(mitigations(&vulnerabilities()));

    let sysctl = |name: &str| read(&format!("/proc/sys/net/netfilter/nf_conntrack_{name}"));
    found.push(conntrack(sysctl("count").as_deref(), sysctl("max").as_deref()));
    found.extend(nics().iter().map(|nic| receive_queues(nic, shards)));
    found.extend(read("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|text| huge_pages(&text)));

    let directory = &config.spool_directory;
    let usable = tempfile::tempfile_in(directory).map(drop);
    let place = directory.canonicalize().unwrap_or_else(|_| directory.clone());
    let kind = read("/proc/self/mountinfo").and_then(|text| filesystem(&text, &place));
    found.push(spool(directory, usable, kind.as_deref()));
    Report(found)
}

// ---------------------------------------------------------------------------------- judging

/// Makes a finding of the text of a sysctl, if there is one to make.
type Judge<'a> = &'a dyn Fn(&str) -> Option<Finding>;

fn kernel(release: &str) -> Finding {
    Finding::ok(format!("Linux {}, uringd {}", release.trim(), env!("CARGO_PKG_VERSION")))
}

fn io_uring(probed: Result<Capabilities, Unavailable>, features: Option<u32>, backend: Backend) -> Vec<Finding> {
    let caps = match probed {
        Ok(caps) => caps,
        Err(why) => {
            // Its text is a sentence and a remedy already.
            let text = why.to_string();
            let (what, remedy) = text.split_once("; try: ").unwrap_or((&text, "--backend epoll"));
            let level = if backend == Backend::Epoll { Level::Note } else { Level::Problem };
            return vec![Finding { level, what: what.to_owned(), remedy: remedy.to_owned() }];
        }
    };
    let what = format!("io_uring tier {}, features {:#x}", caps.tier(), features.unwrap_or(0));
    let tier = if caps.defer_taskrun && caps.multishot_recv {
        Finding::ok(what)
    } else {
        Finding::note(format!("{what}: it works, with more system calls per request than it needs"), "Linux 6.1 or newer")
    };
    vec![tier, Finding::ok(format!("io_uring has {caps}"))]
}

/// `soft` and `hard` of RLIMIT_NOFILE. The server raises the soft one itself.
fn descriptors(soft: u64, hard: u64, connections: u64, shards: u64) -> Finding {
    let wanted = connections * shards + NOFILE_RESERVED;
    let what = format!(
        "descriptors: {} (raised to {} when needed); {wanted} for {connections} connections on each of {shards} cores",
        limit(soft),
        limit(hard)
    );
    let remedy = format!(
        "ulimit -n {wanted} (LimitNOFILE={wanted} under systemd, --ulimit nofile={wanted} in a container), or a smaller --limit-connections"
    );
    match hard {
        0..NOFILE_LEAST => Finding::problem(what, remedy),
        _ if hard < wanted => Finding::note(what, remedy),
        _ => Finding::ok(what),
    }
}

fn memlock(limit_bytes: u64) -> Finding {
    let what = format!("locked memory: {} bytes; rings count against it before Linux 5.12 only", limit(limit_bytes));
    if limit_bytes < MEMLOCK_LEAST {
        return Finding::note(what, "ulimit -l unlimited (LimitMEMLOCK=infinity under systemd)");
    }
    Finding::ok(what)
}

fn limit(value: u64) -> String {
    if value == u64::MAX { "unlimited".to_owned() } else { value.to_string() }
}

fn somaxconn(text: &str, backlog: u32) -> Option<Finding> {
    let cap: u32 = text.trim().parse().ok()?;
    let what = format!("net.core.somaxconn is {cap}");
    Some(if cap < backlog {
        Finding::note(
            format!("{what}: it cuts the queue of {backlog} connections that wait for each listener"),
            format!("sysctl -w net.core.somaxconn={backlog}"),
        )
    } else {
        Finding::ok(what)
    })
}

fn port_range(text: &str) -> Option<Finding> {
    let mut bounds = text.split_whitespace().map(str::parse::<u32>);
    let (first, last) = (bounds.next()?.ok()?, bounds.next()?.ok()?);
    let what = format!("net.ipv4.ip_local_port_range is {first}-{last}");
    Some(if last.saturating_sub(first) < PORTS_LEAST {
        Finding::note(format!("{what}: few ports for connections to one upstream"), "sysctl -w net.ipv4.ip_local_port_range='1024 65535'")
    } else {
        Finding::ok(what)
    })
}

/// Since 5.14. While the server runs, its listeners are never closed; this is about the moment it ends.
fn migrate_req(text: &str) -> Option<Finding> {
    Some(match text.trim() {
        "0" => Finding::note(
            "net.ipv4.tcp_migrate_req is 0: when one of several processes on a port ends, connections that wait in its queue are reset",
            "sysctl -w net.ipv4.tcp_migrate_req=1",
        ),
        "1" => Finding::ok("net.ipv4.tcp_migrate_req is 1"),
        _ => return None,
    })
}

fn overcommit(text: &str) -> Option<Finding> {
    (text.trim() == "2").then(|| {
        Finding::note(
            "vm.overcommit_memory is 2: memory that is reserved and not used counts as used",
            "sysctl -w vm.overcommit_memory=0, or room for it",
        )
    })
}

fn cpus(allowed: &[usize], online: &[usize], shards: usize) -> Option<Finding> {
    if allowed.is_empty() {
        return Some(Finding::note("the CPUs that this process may use cannot be read: one thread, not pinned", "mounting /proc"));
    }
    let what = format!("{} of {} CPUs may be used, {shards} serve, each thread pinned to its own", allowed.len(), online.len());
    Some(if shards > allowed.len() {
        Finding::problem(what, "--cores all, or a wider set (taskset, AllowedCPUs, cpuset)")
    } else {
        Finding::ok(what)
    })
}

/// `quota` in CPUs, of the tightest cgroup.
fn cpu_quota(quota: f64, shards: usize) -> Finding {
    let what = format!("the cgroup's quota is {quota:.2} CPUs for {shards} serving threads");
    if quota < shards as f64 {
        let cores = (quota.floor() as usize).max(1);
        return Finding::problem(
            format!("{what}: once it is used up, all of them stop for the rest of the period, 100 ms as a rule"),
            format!("--cores {cores}, or whole CPUs (cpuset) instead of a quota"),
        );
    }
    Finding::ok(what)
}

fn smt(active: &str) -> Option<Finding> {
    Some(match active.trim() {
        "1" => Finding::note(
            "SMT is on: two serving threads on one core share its caches and its units",
            "--cores with one CPU of each core (lscpu --extended shows them)",
        ),
        "0" => Finding::ok("SMT is off: each CPU is a core"),
        _ => return None,
    })
}

fn numa(online: &str) -> Option<Finding> {
    let nodes = numbers(online)?;
    Some(if nodes.len() > 1 {
        Finding::note(
            format!("{} NUMA nodes: memory and cards of another node are slower", nodes.len()),
            "--cores with the CPUs of the card's node (/sys/class/net/*/device/numa_node)",
        )
    } else {
        Finding::ok("one NUMA node")
    })
}

/// Names and states of /sys/devices/system/cpu/vulnerabilities.
fn mitigations(vulnerabilities: &[(String, String)]) -> Finding {
    let names = |start: &str| {
        let with = vulnerabilities.iter().filter(|(_, state)| state.starts_with(start));
        with.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" ")
    };
    let (mitigated, vulnerable) = (names("Mitigation"), names("Vulnerable"));
    if mitigated.is_empty() {
        return Finding::ok(if vulnerable.is_empty() {
            "no CPU mitigations are needed".to_owned()
        } else {
            format!("CPU mitigations are off: {vulnerable}")
        });
    }
    Finding::note(
        format!("CPU mitigations make each system call dearer: {mitigated}"),
        "leaving them on wherever other people's code runs; mitigations=off on the kernel's command line elsewhere",
    )
}

fn conntrack(count: Option<&str>, max: Option<&str>) -> Finding {
    let number = |text: Option<&str>| text.and_then(|text| text.trim().parse::<u64>().ok());
    let (Some(count), Some(max)) = (number(count), number(max)) else {
        return Finding::ok("connections are not tracked by netfilter");
    };
    let what = format!("netfilter tracks connections: {count} of {max} entries");
    if count * 10 >= max * 8 {
        return Finding::problem(
            format!("{what}; when all are used, packets are dropped"),
            format!("sysctl -w net.netfilter.nf_conntrack_max={}, or a notrack rule for the served port", max * 4),
        );
    }
    Finding::note(format!("{what}; each new connection and each packet pays for it"), "a notrack rule for the served port")
}

/// A network card, and how its packets reach the CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Nic {
    name: String,
    queues: usize,
    /// Queues whose packets are spread by software (rps_cpus is not zero).
    spread: usize,
}

/// RSS is the card's spreading over queues, RPS the kernel's (Documentation/networking/scaling.rst).
fn receive_queues(nic: &Nic, shards: usize) -> Finding {
    let Nic { name, queues, spread } = nic;
    let what = format!("{name}: {queues} receive queues (RSS), {spread} spread in software (RPS)");
    if *queues < shards && *spread == 0 {
        return Finding::note(
            format!("{what}, for {shards} cores: the interrupts of few CPUs carry all of it"),
            format!("ethtool -L {name} combined {shards}, or a CPU mask in /sys/class/net/{name}/queues/rx-0/rps_cpus"),
        );
    }
    Finding::ok(what)
}

/// True when the mask of `rps_cpus` (hexadecimal, with commas) names a CPU.
fn is_spread(mask: &str) -> bool {
    mask.chars().any(|digit| !matches!(digit, '0' | ',' | '\n'))
}

fn huge_pages(enabled: &str) -> Option<Finding> {
    let choice = enabled.split(['[', ']']).nth(1)?;
    Some(match choice {
        "never" => Finding::note(
            "transparent huge pages are off: buffers of many connections cost more TLB misses",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        _ => Finding::ok(format!("transparent huge pages: {choice}")),
    })
}

fn spool(directory: &Path, usable: io::Result<()>, filesystem: Option<&str>) -> Finding {
    let place = directory.display();
    match (usable, filesystem) {
        (Err(error), _) => Finding::problem(
            format!("the spool directory {place} cannot take files: {error}; large bodies get 507"),
            "a directory that this user may write to",
        ),
        (Ok(()), Some(kind @ ("tmpfs" | "ramfs"))) => Finding::note(
            format!("the spool directory {place} is on {kind}: large bodies stay in memory"),
            "a directory on a disk, or a smaller body limit",
        ),
        (Ok(()), kind) => Finding::ok(format!("the spool directory {place} is on {}", kind.unwrap_or("a disk"))),
    }
}

// ---------------------------------------------------------------------------------- parsing

/// `0-2,5` as [0, 1, 2, 5], the form of cpusets (cpuset(7), list format).
fn numbers(list: &str) -> Option<Vec<usize>> {
    let mut found = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last > 65_535 {
            return None;
        }
        found.extend(first..=last);
    }
    Some(found)
}

/// The CPUs of /proc/self/status.
fn cpus_allowed(status: &str) -> Option<Vec<usize>> {
    numbers(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)
}

/// Serving threads, as `server` will choose them.
fn shards(cores: &Cores, allowed: usize) -> usize {
    match cores {
        Cores::All => allowed.max(1),
        Cores::Count(count) => *count,
        Cores::List(list) => list.len(),
    }
}

/// The path of this process in the unified hierarchy (`0::/PATH`), or in that of the cpu controller (version 1).
fn cgroup(text: &str) -> Option<(&str, bool)> {
    let fields = |line: &'_ str| -> Option<(String, String)> {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some((controllers.to_owned(), path.to_owned()))
    };
    let version_1 = text.lines().find(|line| fields(line).is_some_and(|(controllers, _)| controllers.split(',').any(|name| name == "cpu")));
    let unified = text.lines().find(|line| line.starts_with("0::"));
    let line = version_1.or(unified)?;
    Some((line.splitn(3, ':').nth(2)?, version_1.is_none()))
}

/// CPUs of a `cpu.max`: `150000 100000` is 1.5; `max 100000` is none.
fn quota_unified(text: &str) -> Option<f64> {
    let mut words = text.split_whitespace();
    quota(words.next()?, words.next()?)
}

/// CPUs of cpu.cfs_quota_us and cpu.cfs_period_us; -1 is none.
fn quota(quota: &str, period: &str) -> Option<f64> {
    let (quota, period): (f64, f64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// The filesystem that a path is on, by /proc/self/mountinfo (proc_pid_mountinfo(5)): the longest mount point wins, the later of two.
fn filesystem(mountinfo: &str, path: &Path) -> Option<String> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?.replace("\\040", " ");
        path.starts_with(&point).then(|| (point.len(), after.split(' ').next().unwrap_or_default().to_owned()))
    });
    mounts.max_by_key(|(length, _)| *length).map(|(_, kind)| kind)
}

// ---------------------------------------------------------------------------------- reading

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The names in a directory, in order; none when it cannot be read.
fn names(path: &str) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn vulnerabilities() -> Vec<(String, String)> {
    const DIRECTORY: &str = "/sys/devices/system/cpu/vulnerabilities";
    names(DIRECTORY).into_iter().filter_map(|name| Some((name.clone(), read(&format!("{DIRECTORY}/{name}"))?))).collect()
}

/// The cards besides `lo`; interfaces without a device (bridges, tunnels) have no queues of their own.
fn nics() -> Vec<Nic> {
    let has_device = |name: &String| Path::new("/sys/class/net").join(name).join("device").exists();
    let nic = |name: String| {
        let directory = format!("/sys/class/net/{name}/queues");
        let queues: Vec<String> = names(&directory).into_iter().filter(|queue| queue.starts_with("rx-")).collect();
        let spread =
            queues.iter().filter(|queue| read(&format!("{directory}/{queue}/rps_cpus")).is_some_and(|mask| is_spread(&mask))).count();
        Nic { queues: queues.len(), spread, name }
    };
    names("/sys/class/net").into_iter().filter(has_device).map(nic).collect()
}

/// The tightest quota among the cgroup of this process and those around it.
fn quota_of_this_process() -> Option<f64> {
    let text = read("/proc/self/cgroup")?;
    let (path, unified) = cgroup(&text)?;
    let root = if unified { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/cpu" };
    let quota_in = |directory: PathBuf| {
        let file = |name: &str| fs::read_to_string(directory.join(name)).ok();
        if unified { quota_unified(&file("cpu.max")?) } else { quota(&file("cpu.cfs_quota_us")?, &file("cpu.cfs_period_us")?) }
    };
    let inner = Path::new(path.trim_start_matches('/'));
    inner.ancestors().filter_map(|part| quota_in(Path::new(root).join(part))).min_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_that_is_not_ok_has_a_remedy() {
        let report = examine(&Config::default());
        assert!(report.0.len() > 8, "{report}");
        for finding in &report.0 {
            assert!(finding.level == Level::Ok || !finding.remedy.is_empty(), "{finding}");
            assert!(!finding.to_string().contains('\n'), "{finding}");
        }
    }

    #[test]
    fn a_finding_is_one_line_of_level_fact_and_remedy() {
        assert_eq!(Finding::note("it rains", "an umbrella").to_string(), "note     it rains; try: an umbrella");
        assert_eq!(Finding::ok("it shines").to_string(), "ok       it shines");
        let problem = Report(vec![Finding::ok("a"), Finding::problem("b", "c")]);
        assert!(problem.has_problem() && problem.to_string() == "ok       a\nproblem  b; try: c\n");
    }

    #[test]
    fn io_uring_forbidden_is_a_problem_unless_epoll_was_chosen() {
        let found = io_uring(Err(Unavailable::Disabled { value: 2 }), None, Backend::Auto);
        assert_eq!((found[0].level, found.len()), (Level::Problem, 1));
        assert!(found[0].remedy.contains("sysctl -w kernel.io_uring_disabled=0"), "{}", found[0]);
        assert_eq!(io_uring(Err(Unavailable::Missing), None, Backend::Epoll)[0].level, Level::Note);
    }

    #[test]
    fn descriptors_are_judged_by_the_hard_limit() {
        assert_eq!(descriptors(1024, 1 << 20, 16_384, 2).level, Level::Ok);
        assert_eq!(descriptors(1024, 4096, 16_384, 2).level, Level::Note);
        assert!(descriptors(1024, 4096, 16_384, 2).remedy.contains("ulimit -n 32800"));
        assert_eq!(descriptors(64, 64, 16_384, 2).level, Level::Problem);
        assert!(descriptors(1024, u64::MAX, 1, 1).what.contains("unlimited"));
    }

    #[test]
    fn sysctls_are_judged_by_what_the_server_needs() {
        assert_eq!(somaxconn("4096\n", 4096).expect("a number").level, Level::Ok);
        assert_eq!(somaxconn("128\n", 4096).expect("a number").remedy, "sysctl -w net.core.somaxconn=4096");
        assert_eq!(port_range("32768\t60999\n").expect("two numbers").level, Level::Ok);
        assert_eq!(port_range("60000\t60999\n").expect("two numbers").level, Level::Note);
        assert_eq!(port_range("what"), None);
        assert_eq!(migrate_req("0\n").expect("known").level, Level::Note);
        assert_eq!(migrate_req("1\n").expect("known").level, Level::Ok);
        assert_eq!((overcommit("0\n"), overcommit("2\n").expect("known").level), (None, Level::Note));
        assert_eq!((memlock(0).level, memlock(8 << 20).level), (Level::Note, Level::Ok));
    }

    #[test]
    fn cpus_and_quotas_are_read_as_the_kernel_writes_them() {
        assert_eq!(numbers("0-2,5\n"), Some(vec![0, 1, 2, 5]));
        assert_eq!(numbers("\n"), Some(vec![]));
        assert_eq!((numbers("2-1"), numbers("x"), numbers("0-99999999")), (None, None, None));
        let status = "Name:\turingd\nCpus_allowed:\t3\nCpus_allowed_list:\t0-1\nMems_allowed:\t1\n";
        assert_eq!(cpus_allowed(status), Some(vec![0, 1]));
        assert_eq!(cpus(&[0, 1], &[0, 1, 2, 3], 2).expect("a line").level, Level::Ok);
        assert_eq!(cpus(&[0], &[0, 1], 2).expect("a line").level, Level::Problem);
        assert_eq!(cpus(&[], &[0, 1], 1).expect("a line").level, Level::Note);
        assert_eq!(quota_unified("150000 100000\n"), Some(1.5));
        assert_eq!((quota_unified("max 100000\n"), quota("-1\n", "100000\n"), quota("50000", "100000")), (None, None, Some(0.5)));
        assert_eq!(cpu_quota(1.5, 2).level, Level::Problem);
        assert!(cpu_quota(0.5, 2).remedy.starts_with("--cores 1,"));
        assert_eq!(cpu_quota(2.0, 2).level, Level::Ok);
    }

    #[test]
    fn the_cgroup_of_a_process_is_found_in_both_versions() {
        assert_eq!(cgroup("0::/system.slice/uringd.service\n"), Some(("/system.slice/uringd.service", true)));
        assert_eq!(cgroup("4:memory:/m\n3:cpu,cpuacct:/docker/ab\n0::/x\n"), Some(("/docker/ab", false)));
        assert_eq!(cgroup("5:cpuset:/only\n"), None);
        assert_eq!(cgroup(""), None);
    }

    #[test]
    fn smt_numa_and_huge_pages_are_told_as_they_are() {
        assert_eq!(smt("1\n").expect("known").level, Level::Note);
        assert_eq!((smt("0\n").expect("known").level, smt("?")), (Level::Ok, None));
        assert_eq!(numa("0\n").expect("a list").level, Level::Ok);
        assert_eq!(numa("0-1\n").expect("a list").level, Level::Note);
        assert_eq!(huge_pages("always [madvise] never\n").expect("a choice").what, "transparent huge pages: madvise");
        assert_eq!(huge_pages("always madvise [never]\n").expect("a choice").level, Level::Note);
        assert_eq!(huge_pages("what"), None);
    }

    #[test]
    fn mitigations_are_named_with_their_price() {
        let state = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        let some =
            [state("spectre_v2", "Mitigation: Retpolines\n"), state("mds", "Not affected\n"), state("meltdown", "Mitigation: PTI\n")];
        let found = mitigations(&some);
        assert!(found.level == Level::Note && found.what.ends_with(": spectre_v2 meltdown"), "{found}");
        assert_eq!(mitigations(&[state("mds", "Not affected\n")]).what, "no CPU mitigations are needed");
        assert!(mitigations(&[state("mds", "Vulnerable\n")]).what.contains("off: mds"));
    }

    #[test]
    fn connection_tracking_is_a_cost_and_near_its_limit_a_problem() {
        assert_eq!(conntrack(None, None).level, Level::Ok);
        assert_eq!(conntrack(Some("12\n"), Some("262144\n")).level, Level::Note);
        assert_eq!(conntrack(Some("250000\n"), Some("262144\n")).level, Level::Problem);
    }

    #[test]
    fn a_card_with_fewer_queues_than_cores_is_noted_unless_it_is_spread_in_software() {
        let nic = |queues, spread| Nic { name: "eth0".to_owned(), queues, spread };
        assert_eq!(receive_queues(&nic(1, 0), 2).level, Level::Note);
        assert!(receive_queues(&nic(1, 0), 2).remedy.contains("ethtool -L eth0 combined 2"));
        assert_eq!(receive_queues(&nic(1, 1), 2).level, Level::Ok);
        assert_eq!(receive_queues(&nic(4, 0), 2).level, Level::Ok);
        assert!(is_spread("00000000,0000000f\n") && !is_spread("00000000,00000000\n"));
    }

    #[test]
    fn the_spool_is_looked_up_by_its_longest_mount() {
        let mounts = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 21 0:25 / /tmp rw,nosuid shared:3 - tmpfs tmpfs rw\n\
                      31 21 8:2 / /var/my\\040disk rw - xfs /dev/sdb rw\n";
        assert_eq!(filesystem(mounts, Path::new("/var/tmp")).as_deref(), Some("ext4"));
        assert_eq!(filesystem(mounts, Path::new("/tmp/x")).as_deref(), Some("tmpfs"));
        assert_eq!(filesystem(mounts, Path::new("/tmpfile")).as_deref(), Some("ext4"));
        assert_eq!(filesystem(mounts, Path::new("/var/my disk/a")).as_deref(), Some("xfs"));
        let here = Path::new("/var/tmp");
        assert_eq!(spool(here, Ok(()), Some("tmpfs")).level, Level::Note);
        assert_eq!(spool(here, Ok(()), Some("ext4")).level, Level::Ok);
        assert_eq!(spool(here, Err(io::ErrorKind::NotFound.into()), None).level, Level::Problem);
    }
}
