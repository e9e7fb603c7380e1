//! Who a connection and a request come from, when somebody in between says so.

use super::{Engine, Micros};
use crate::{
    driver::Peer,
    http1::Head,
    identity::{self, Origin},
    proxy_protocol::{self, Fault, Step},
    shard::{engine::Canary, slot::Slot},
};

impl Engine {
    /// Whether somebody may connect at all: where the PROXY protocol is on, only proxies may.
    pub(super) fn may_connect(&self, peer: Peer) -> bool {
        let welcome = self.proxy_protocol.as_ref().is_none_or(|allowed| allowed.contain(peer));
        if !welcome {
            self.stats.proxy_refused.add(1);
            tracing::info!(%peer, "closed: only proxies may connect, and this is none; try: --proxy-allow-from");
        }
        welcome
    }

    /// Counts another connection of a client. False: it has as many as it may.
    pub(super) fn count_client(&mut self, peer: Peer) -> bool {
        if let (Some(limit), Peer::Inet(address)) = (self.limits.connections_per_ip_max, peer) {
            let count = self.clients.entry(address.ip()).or_default();
            if *count >= limit {
                self.stats.ip_limited.add(1);
                return false;
            }
            *count += 1;
        }
        true
    }

    pub(super) fn forget_client(&mut self, slot: &Slot) {
        if let (Some(_), Peer::Inet(address), true) = (self.limits.connections_per_ip_max, slot.peer, slot.counted)
            && let Some(count) = self.clients.get_mut(&address.ip())
        {
            *count -= 1;
            if *count == 0 {
                self.clients.remove(&address.ip());
            }
        }
    }

    /// The first bytes of a connection that must begin with a PROXY protocol header. Returns how many it took; `None`: more
    /// are needed.
    ///
    /// A connection without one is closed without an answer: whoever is there does not speak HTTP with us yet. The
    /// header has the time and the room of a request's head, and the first request's head has as much again.
    pub(super) fn take_proxy_header(&mut self, key: usize, input: &[u8], now: Micros) -> Option<usize> {
        let slot = &mut self.slots[key];
        match proxy_protocol::parse(input, self.limits.head_bytes_max) {
            Ok(Step::NeedData) => {
                if self.planted.is(Canary::HeaderRenewsTime) {
                    slot.since = now;
                }
                None
            }
            Err(_) if self.planted.is(Canary::HeaderFaultForgiven) => None,
            Ok(Step::Done { length, source }) => {
                slot.proxy_awaited = false;
                slot.since = now;
                let peer = source.unwrap_or(slot.accepted_from);
                slot.peer = peer;
                let counted = self.count_client(peer);
                let slot = &mut self.slots[key];
                slot.counted = counted;
                // The client has as many connections as it may.
                slot.last |= !counted;
                slot.reset |= !counted;
                Some(length)
            }
            Err(fault) => {
                self.refuse_proxy_header(key, fault);
                Some(input.len())
            }
        }
    }

    /// Nothing is served on the connection, and nothing is said.
    pub(super) fn refuse_proxy_header(&mut self, key: usize, fault: Fault) {
        self.stats.proxy_refused.add(1);
        let slot = &mut self.slots[key];
        slot.last = true;
        tracing::info!(peer = %slot.accepted_from, "closed: {fault}; try: {}", fault.remedy());
    }

    /// What proxies say about a request that has fields for it; removes those of anybody else.
    pub(super) fn settle_origin(&mut self, slot_key: usize, head: &mut Head, bytes: &[u8]) -> Option<Origin> {
        let slot = &self.slots[slot_key];
        let peer = if self.planted.is(Canary::StrangerBelieved) { slot.accepted_from } else { slot.peer };
        let verdict = identity::settle(head, bytes, peer, &self.forwarded);
        if verdict.removed > 0 {
            self.stats.forwarding_removed.add(verdict.removed as u64);
            tracing::debug!(peer = %slot.peer, fields = verdict.removed, "removed what names the client and is not a trusted proxy's; try: --forwarded-allow-ips");
        }
        verdict.origin
    }
}
