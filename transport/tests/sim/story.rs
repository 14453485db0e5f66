//! What happens in a simulated world, drawn from its seed.

use super::{Duration, Fate, HashMap, Instant, LIMITS, Lane, World, payload};
use conet_testkit::link::Faults;

const SECOND: Duration = Duration::from_secs(1);

impl World {
    /// A whole story: calls and blows, then time for all calls to end.
    pub(crate) fn play(seed: u64, steps: u64) -> Self {
        let mut world = Self::new(seed);
        world.flush();
        for _ in 0..steps {
            world.step();
        }
        world.link.set_cut(false);
        // Rows, large payloads and 30 % loss may take their time.
        let end = world.now + SECOND * 1200;
        world.run_until(end, |world| world.unfinished() > 0);
        assert_eq!(world.unfinished(), 0, "seed {seed}: calls hang");
        // Whatever still travels must change nothing.
        world.run_for(SECOND * 3);
        world.check();
        world
    }

    fn step(&mut self) {
        let node = usize::try_from(self.random.below(2)).expect("two");
        match self.random.below(200) {
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
            0 => self.random.below(LIMITS.payload as u64 / 2),
            1..=8 => self.random.below(6000),
            _ => self.random.below(300),
        };
        let serial = self.serial(None);
        let (lane, deadline, peer) = (self.lane(), self.deadline(), self.keys[1 - node]);
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
        // The newest is the likeliest to be under way.
        if let Some(id) = process.calls.keys().max().copied() {
            process.hub.cancel(self.now, &peer, id).ok();
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
        for serial in self.processes[at].calls.values() {
            if let Some(fate) = self.fates.get_mut(serial) {
                fate.orphan = true;
            }
        }
        // An image of a life that has ended is another story: its secret is forgotten on
        // both sides, and whoever comes first is the session.
        self.images.clear();
        self.processes.iter_mut().filter(|p| p.is_twin).for_each(|twin| {
            twin.address = std::net::SocketAddr::from(([192, 0, 2, 99], 1));
        });
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
