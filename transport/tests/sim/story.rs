//! What happens in a simulated world, drawn from its seed.

use super::{
    Duration, Fate, HashMap, Instant, Lane, World, payload, stream_address, stream_number,
};
use conet_testkit::link::Faults;

const SECOND: Duration = Duration::from_secs(1);
/// When all goes well calls end in that time: a parked one is asked for every 30 s.
const SOON: Duration = Duration::from_secs(90);

impl World {
    /// A whole story: calls and blows, then time for all calls to end.
    pub(crate) fn play(seed: u64, steps: u64) -> Self {
        let mut world = Self::new(seed);
        world.flush();
        for _ in 0..steps {
            world.step();
        }
        // Nothing goes wrong any more: all calls end soon, and new ones are answered.
        world.link.set_faults(Faults::none(Duration::from_millis(1)));
        world.strays = 0;
        // Few slots and patient calls may take their time, but always one ends.
        let mut before = usize::MAX;
        while world.unfinished() > 0 {
            let hangs = world.unfinished() == before;
            assert!(!hangs, "seed {seed}: calls hang: {}", world.what_hangs());
            before = world.unfinished();
            world.run_until(world.now + SOON, |world| world.unfinished() > 0);
        }
        world.is_last = true;
        // Who has just restarted is noticed.
        world.run_for(SECOND * 15);
        let (before, calls) = (world.answered(), world.fates.len());
        for node in 0..2 {
            world.call_with(node, Lane::Calls, 100, None);
        }
        let new = world.fates.len() - calls;
        let end = world.now + SOON;
        world.run_until(end, |world| world.unfinished() > 0);
        let answered = world.answered() - before;
        assert_eq!(answered, new, "seed {seed}: a call at peace is not answered");
        // Whatever still travels must change nothing.
        world.run_for(SECOND * 3);
        world.check();
        world
    }

    fn what_hangs(&self) -> String {
        let open = self.fates.iter().filter(|(_, fate)| fate.ended.is_empty() && !fate.orphan);
        let open: Vec<_> = open.map(|(serial, fate)| (serial, fate.executions)).collect();
        let ends = self.at.iter().flat_map(|at| self.processes[*at].hub.status(self.now));
        format!("{open:?}, {:#?}", ends.collect::<Vec<_>>())
    }

    fn answered(&self) -> usize {
        self.fates.values().filter(|fate| matches!(fate.ended.first(), Some(Ok(_)))).count()
    }

    fn step(&mut self) {
        let node = usize::try_from(self.random.below(2)).expect("two");
        match self.random.below(212) {
            0..=119 => self.call(node),
            120..=149 => self.row(node),
            150..=164 => self.cancel(node),
            165..=176 => self.rebind(node),
            177..=182 => self.move_one(node),
            183..=184 => self.move_both(),
            185..=187 => self.thaw_old(),
            188..=189 => self.restart(node),
            190..=191 => {
                self.link.set_cut(true);
                let time = self.random.below(8_000);
                self.run_for(Duration::from_millis(time));
                self.link.set_cut(false);
            }
            192..=193 => {
                let mut faults = Faults::drawn_from(&mut self.random);
                faults.lose = u32::try_from(self.random.below(301)).expect("small");
                self.link.set_faults(faults);
            }
            200..=203 => self.pause(node),
            204..=208 => self.change_way(),
            209..=211 => self.burst(node),
            _ => {
                let time = self.random.below(2_000_000);
                self.run_for(Duration::from_micros(time));
            }
        }
        self.flush();
        let time = self.random.below(3000);
        self.run_for(Duration::from_micros(time));
    }

    fn serial(&mut self, before: Option<u64>) -> u64 {
        let serial = self.tally.calls;
        self.tally.calls += 1;
        self.fates.insert(serial, Fate { before, ..Fate::default() });
        serial
    }

    fn deadline(&mut self) -> Option<Instant> {
        let some = self.random.chance(300);
        some.then(|| self.now + Duration::from_micros(self.random.below(5_000_000)))
    }

    fn lane(&mut self) -> Lane {
        Lane::ALL[usize::try_from(self.random.below(4)).expect("four")]
    }

    fn call(&mut self, node: usize) {
        let length = match self.random.below(40) {
            0 => self.random.below(self.limits[node].payload as u64 / 2),
            1..=8 => self.random.below(6000),
            _ => self.random.below(300),
        };
        let (lane, deadline) = (self.lane(), self.deadline());
        self.call_with(node, lane, length, deadline);
    }

    fn call_with(&mut self, node: usize, lane: Lane, length: u64, deadline: Option<Instant>) {
        let (serial, peer) = (self.serial(None), self.keys[1 - node]);
        let bytes = payload(serial, usize::try_from(length).expect("small"));
        let process = &mut self.processes[self.at[node]];
        match process.hub.call_on(self.now, &peer, lane, bytes, deadline) {
            Ok(id) => drop(process.calls.insert(id, serial)),
            // Its session is frozen, or superseded and taken away.
            Err(_) => drop(self.fates.remove(&serial)),
        }
    }

    fn row(&mut self, node: usize) {
        let length = 2 + self.random.below(7);
        let (lane, deadline, peer) = (self.lane(), self.deadline(), self.keys[1 - node]);
        let mut serials = Vec::new();
        let mut row = Vec::new();
        for _ in 0..length {
            let serial = self.serial(serials.last().copied());
            serials.push(serial);
            let bytes = usize::try_from(self.random.below(1000)).expect("small");
            row.push((payload(serial, bytes), self.random.chance(300)));
        }
        let mut ids = Vec::new();
        let process = &mut self.processes[self.at[node]];
        let row = row.into_iter();
        match process.hub.call_row(self.now, &peer, lane, row, deadline, &mut ids) {
            Ok(()) => process.calls.extend(ids.into_iter().zip(serials)),
            Err(_) => self.fates.retain(|serial, _| !serials.contains(serial)),
        }
    }

    fn cancel(&mut self, node: usize) {
        let peer = self.keys[1 - node];
        let process = &mut self.processes[self.at[node]];
        // The newest are the likeliest to be under way, and any of a row may be meant.
        let mut ids: Vec<_> = process.calls.keys().copied().collect();
        ids.sort_unstable();
        let back = usize::try_from(self.random.below(10)).expect("few");
        if let Some(id) = ids.iter().rev().nth(back) {
            process.hub.cancel(self.now, &peer, *id).ok();
        }
    }

    /// More calls than there are slots at first.
    fn burst(&mut self, node: usize) {
        for _ in 0..self.random.below(120) {
            if self.random.chance(100) { self.row(node) } else { self.call(node) }
        }
    }

    /// A process has no processor for a while, seldom for long; the other one calls on.
    fn pause(&mut self, node: usize) {
        // Old nodes know for two minutes where who has moved is.
        let is_long = self.random.chance(30) && self.is_settled();
        let most = if is_long { 3600 } else { 15 };
        let time = Duration::from_millis(1 + self.random.below(most * 1000));
        let at = self.at[node];
        if self.processes[at].is_ghost {
            return;
        }
        self.processes[at].paused_until = Some(self.now + time);
        self.tally.pauses += 1;
        self.note(&format!("{node} pauses for {time:?}"));
        let end = self.now + time;
        for _ in 0..self.random.below(5) {
            self.call(1 - node);
            self.flush();
            let step = self.random.below(u64::try_from(time.as_micros()).expect("short") / 4);
            self.run_until((self.now + Duration::from_micros(step)).min(end), |_| true);
        }
        self.run_until(end, |_| true);
    }

    /// A stream between the two begins, or it breaks; who goes over takes the other along.
    fn change_way(&mut self) {
        let ends = [0, 1].map(|node: usize| self.processes[self.at[node]].address);
        if self.has_stream {
            self.break_stream();
        } else if self.is_settled() {
            self.stream += 1;
            self.has_stream = true;
            self.tally.streams += 1;
            let node = usize::try_from(self.random.below(2)).expect("two");
            let (key, number) = (self.keys[1 - node], self.stream * 2 + node as u64);
            self.note(&format!("{node} goes over, {ends:?}"));
            let hub = &mut self.processes[self.at[node]].hub;
            hub.redirect(self.now, &key, stream_address(number));
        }
    }

    /// As whoever chooses ways does it: both ends are told, and go back to datagrams.
    pub(super) fn break_stream(&mut self) {
        if !core::mem::take(&mut self.has_stream) {
            return;
        }
        self.note("the stream breaks");
        for node in 0..2 {
            let key = self.keys[1 - node];
            let there = self.processes[self.at[1 - node]].address;
            let hub = &mut self.processes[self.at[node]].hub;
            let is_on = |at: std::net::SocketAddr| stream_number(at).is_some();
            if hub.address_of(&key).is_some_and(is_on) {
                hub.redirect(self.now, &key, there);
            }
        }
    }

    fn knows(&self, node: usize) -> Option<std::net::SocketAddr> {
        let status = self.processes[self.at[node]].hub.status(self.now).next()?;
        status.address.filter(|_| status.up)
    }

    /// Whether each end has the other's address.
    fn is_settled(&self) -> bool {
        let at = |node: usize| Some(self.processes[self.at[node]].address);
        self.knows(0) == at(1) && self.knows(1) == at(0)
    }

    /// The address changes under the process, as by a NAT that has forgotten it. Not
    /// while the other end's change is not known: then neither could find the other.
    fn rebind(&mut self, node: usize) {
        if self.is_settled() {
            let address = self.fresh_address(node);
            self.processes[self.at[node]].address = address;
            self.tally.rebinds += 1;
            self.note("rebind");
        }
    }

    /// Freezes a node's process; gives the image, or `None` where nothing can move.
    fn freeze(&mut self, node: usize) -> Option<conet_transport::session::Frozen> {
        let peer = self.keys[1 - node];
        self.break_stream();
        let process = &mut self.processes[self.at[node]];
        let frozen = process.hub.freeze(self.now, &peer).ok()?;
        process.is_ghost = true;
        self.flush();
        if self.random.chance(500) {
            self.images.push((node, frozen.clone()));
        }
        self.note(&format!("{node} frozen, {} bytes", frozen.image.len()));
        Some(frozen)
    }

    fn thaw(&mut self, node: usize, frozen: &conet_transport::session::Frozen) {
        let address = self.fresh_address(node);
        let mut process = self.process(node, address);
        let thawed = process.hub.thaw(self.now, &frozen.image, None).expect("our image");
        // The application has moved along.
        let old = &mut self.processes[self.at[node]];
        process.calls = core::mem::take(&mut old.calls);
        process.due = core::mem::take(&mut old.due);
        let known: Vec<_> = process.due.values().map(|due| due.id).collect();
        for (id, _) in thawed.running {
            assert!(known.contains(&id), "seed {}: a call of nobody runs", self.seed);
        }
        let was = self.at[node];
        self.processes.push(process);
        self.at[node] = self.processes.len() - 1;
        self.tally.thaws += 1;
        self.note(&format!("{node} thawed"));
        let peer = self.keys[1 - node];
        self.processes[was].hub.set_moved(self.now, &peer, address).ok();
        self.flush();
    }

    fn move_one(&mut self, node: usize) {
        if !self.is_settled() {
            return;
        }
        let Some(frozen) = self.freeze(node) else { return };
        let gap = self.random.below(300_000);
        self.run_for(Duration::from_micros(gap));
        if self.random.chance(50) {
            self.restart(1 - node);
            self.run_for(Duration::from_micros(gap));
        }
        self.thaw(node, &frozen);
    }

    /// Both ends at once: only the old nodes know where they have gone.
    fn move_both(&mut self) {
        if !self.is_settled() {
            return;
        }
        let frozen = [self.freeze(0), self.freeze(1)];
        let [Some(one), Some(two)] = frozen else {
            for (node, frozen) in frozen.into_iter().enumerate() {
                if let Some(frozen) = frozen {
                    self.thaw(node, &frozen);
                }
            }
            return;
        };
        let gap = self.random.below(300_000);
        self.run_for(Duration::from_micros(gap));
        self.thaw(0, &one);
        let gap = self.random.below(100_000);
        self.run_for(Duration::from_micros(gap));
        self.thaw(1, &two);
    }

    /// Somebody thaws an image that has been thawed already.
    fn thaw_old(&mut self) {
        let Some((node, frozen)) = self.images.pop() else { return };
        // The life that counts is to be there first: of two, the first one wins.
        if self.processes[self.at[node]].is_ghost || !self.is_settled() {
            return;
        }
        let address = self.fresh_address(node);
        let mut twin = self.process(node, address);
        let to = self.processes[self.at[1 - node]].address;
        if twin.hub.thaw(self.now, &frozen.image, Some(to)).is_ok() {
            twin.is_twin = true;
            self.processes.push(twin);
            self.tally.twins += 1;
            self.note(&format!("{node} thawed again"));
        }
    }

    /// The process dies, and another one begins without memory.
    fn restart(&mut self, node: usize) {
        let at = self.at[node];
        self.break_stream();
        for serial in self.processes[at].calls.values() {
            if let Some(fate) = self.fates.get_mut(serial) {
                fate.orphan = true;
            }
        }
        // An image of a life that has ended is another story: its secret is forgotten on
        // both sides, and whoever comes first is the session.
        self.images.clear();
        for twin in self.processes.iter_mut().filter(|process| process.is_twin) {
            for key in &self.keys {
                twin.hub.remove_peer(key).ok();
            }
        }
        let (address, key) = (self.processes[at].address, self.keys[1 - node]);
        let other = self.processes[self.at[1 - node]].address;
        let mut process = self.process(node, address);
        process.hub.add_peer(self.now, key, Some(other));
        process.calls = HashMap::new();
        self.processes[at] = process;
        self.tally.restarts += 1;
        self.note(&format!("{node} restarts"));
    }
}
