//! One core: its thread, its driver, its engine, its couriers to worker processes, and the loop that joins them.

pub mod deadlines;
pub mod engine;
#[cfg(test)]
pub(crate) mod sim;
pub mod slot;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::{
    driver::{Completion, Driver, policy, waker::Waker},
    exchange::Micros,
    pool::{Answer, Clock, Desk},
    python::dispatch::Dispatch,
    server::listeners::Listeners,
    shard::engine::{Engine, Life},
};

/// After a forced stop, the kernel is given this long to report the end of what it has in flight.
const STOP_WAIT: Micros = 2_000_000;

/// How the rest of the process tells the shards to end.
#[derive(Debug, Default)]
pub struct Control {
    life: AtomicU8,
    wakers: Mutex<Vec<Waker>>,
    /// The listening sockets, and how many shards still accept on them.
    listening: Mutex<(Option<Listeners>, usize)>,
}

impl Control {
    /// Every shard hears of it at once. There is no way back.
    pub fn wind_down(&self, life: Life) {
        self.life.fetch_max(life as u8, Ordering::SeqCst);
        self.wakers.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).iter().for_each(Waker::wake);
    }

    /// Keeps the listening sockets open as long as one of so many shards accepts.
    pub fn listen(&self, listeners: Listeners, shards: usize) {
        *self.listening.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = (Some(listeners), shards);
    }

    /// A shard accepts no more. After the last one, the sockets are closed: who comes now is refused, and may go elsewhere.
    pub fn accepts_nothing(&self) {
        let mut listening = self.listening.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        listening.1 = listening.1.saturating_sub(1);
        if listening.1 == 0 {
            listening.0 = None;
        }
    }

    pub fn register(&self, waker: Waker) {
        self.wakers.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(waker);
    }

    pub fn life(&self) -> Life {
        match self.life.load(Ordering::SeqCst) {
            0 => Life::Serving,
            1 => Life::Draining,
            _ => Life::Stopping,
        }
    }
}

/// Serves until it is told to end.
///
/// Returns how many requests were not answered when the drain limit was over.
///
/// # Errors
/// Only when the driver itself fails; no peer can cause that.
pub fn run(
    driver: &mut dyn Driver,
    engine: &mut Engine,
    desk: &Desk,
    mut workers: Option<&mut Dispatch>,
    control: &Arc<Control>,
    clock: Clock,
    drain: Duration,
) -> io::Result<usize> {
    let waker = driver.waker();
    let mut second = 0;
    let mut drain_until = None;
    let mut stop_until = None;
    let mut refusing = false;
    let mut saturated = false;
    let mut patient = false;
    let mut lost = 0;
    loop {
        engine.stats().turns.add(1);
        engine.stats().enters.set(driver.figures().enters);
        let now = clock.now();
        if now / 1_000_000 != second {
            second = now / 1_000_000;
            engine.set_date(SystemTime::now());
        }
        if let Some(workers) = &mut workers {
            workers.turn(now);
            workers.answers(|answer| take(engine, answer, now));
        }
        while let Some(answer) = desk.answer() {
            take(engine, answer, now);
        }
        if control.life() >= Life::Draining && drain_until.is_none() {
            drain_until = Some(now + drain.as_micros() as Micros);
            engine.wind_down(Life::Draining, now);
        }
        let drained_out = drain_until.is_some_and(|until| until <= now);
        if stop_until.is_none() && (control.life() == Life::Stopping || drained_out) {
            lost = engine.unanswered();
            stop_until = Some(now + STOP_WAIT);
            engine.wind_down(Life::Stopping, now);
        }
        if drain_until.is_some() && !refusing && engine.accepts_nothing() {
            refusing = true;
            control.accepts_nothing();
        }
        let over = stop_until.is_some_and(|until| until <= now);
        if over || drain_until.is_some() && engine.is_quiet() && engine.ops.is_empty() {
            if let Some(workers) = workers {
                wind_up(driver, workers, clock)?;
            }
            return Ok(lost);
        }

        let mut dispatch = std::mem::take(&mut engine.dispatch);
        for exchange in dispatch.drain(..) {
            if let Err(exchange) = desk.offer(exchange) {
                engine.queue_full(exchange, now);
            }
        }
        if let Some(workers) = &mut workers {
            workers.dispatch();
            workers.ops().for_each(|op| driver.push(op));
        }
        desk.ring();
        // Its room is used again. What came up meanwhile waits in the engine's own list for the next turn.
        dispatch.append(&mut engine.dispatch);
        engine.dispatch = dispatch;
        engine.end_turn(now);
        engine.ops.drain(..).for_each(|op| driver.push(op));
        engine.disk.drain(..).for_each(|job| desk.spool(job));

        waker.sleep();
        let more = desk.has_answer()
            || !engine.dispatch.is_empty()
            || workers.as_ref().is_some_and(|workers| workers.has_news())
            || control.life() as u8 > 0 && stop_until.is_none() && drain_until.is_none();
        let look_at = workers.as_ref().and_then(|workers| workers.next_deadline());
        let deadlines = [engine.next_deadline(), look_at, drain_until.filter(|_| stop_until.is_none()), stop_until];
        let timeout = match deadlines.into_iter().flatten().min() {
            _ if more || engine.is_quiet() && drain_until.is_some() => Some(Duration::ZERO),
            Some(due) => Some(Duration::from_micros(due.saturating_sub(now))),
            None => None,
        };
        // What arrives now can only wait, so whoever computes the next answers is not interrupted for each piece of it. Twice in
        // a row, because somebody who was just woken has not taken his request yet.
        let was_saturated = std::mem::replace(&mut saturated, desk.is_saturated());
        let busy = workers.as_ref().is_some_and(|workers| workers.is_saturated());
        if (busy || saturated && was_saturated) != patient {
            patient = !patient;
            // Where it is forbidden, everything is only slower.
            let _ = policy::interrupt_others(!patient);
        }
        let mut woken_at = None;
        driver.wait(timeout, &mut |completion| {
            let now = *woken_at.get_or_insert_with(|| clock.now());
            match &mut workers {
                Some(workers) if is_of_channel(&completion) => workers.handle(completion, now),
                _ => engine.handle(completion, now),
            }
        })?;
    }
}

fn take(engine: &mut Engine, answer: Answer, now: Micros) {
    match answer {
        Answer::Response(exchange) => engine.answered(exchange, now),
        Answer::Hints { token, serial, fields } => engine.hinted(token, serial, &fields, now),
        Answer::Piece { token, serial, bytes } => engine.piece(token, serial, bytes, now),
        Answer::Extended { token, serial, since } => engine.extended(token, serial, since, now),
        Answer::Ended { token, serial, whole } => engine.ended(token, serial, whole, now),
        Answer::Disk(done) => engine.disk_done(done, now),
    }
}

fn is_of_channel(completion: &Completion<'_>) -> bool {
    match completion {
        Completion::Received { token, .. } | Completion::RecvEnded { token, .. } | Completion::Sent { token, .. } => token.is_channel(),
        Completion::Accepted { .. } | Completion::AcceptEnded { .. } => false,
    }
}

/// Lets go of the workers, and waits for what is in flight to them.
fn wind_up(driver: &mut dyn Driver, workers: &mut Dispatch, clock: Clock) -> io::Result<()> {
    let until = clock.now() + STOP_WAIT;
    workers.wind_up(clock.now());
    // No request waits for any of these answers.
    workers.answers(drop);
    while !workers.is_quiet() && clock.now() < until {
        workers.ops().for_each(|op| driver.push(op));
        let left = Duration::from_micros(until.saturating_sub(clock.now()));
        driver.wait(Some(left), &mut |completion| {
            if is_of_channel(&completion) {
                workers.handle(completion, clock.now());
            }
        })?;
    }
    Ok(())
}
