//! Programs that become others and make others while they are away.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::time::Duration;

use common::{Lab, Said, Shared, exists, migrate, python, row, take_out, wait_until};
use conet_testkit::Need;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_program_becomes_another_away_and_may_move_again() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let first = "
import os, sys, time
print('first', flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
os.execv(sys.executable, [sys.executable, '-c', sys.argv[3], sys.argv[2], str(os.getpid())])";
    let second = "
import os, sys, time
print('second', str(os.getpid()) == sys.argv[2], flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
sys.exit(5)";
    let (python, go, end) = (python(), Shared::new("go"), Shared::new("end"));
    let mut program = lab.run(&[&python, "-c", first, go.path(), end.path(), second]);
    let (pid, said) = (program.pid(), Said::by(&mut program));
    said.wait_for("first");
    let remote = take_out(pid);
    go.create();
    said.wait_for("second");
    wait_until("being at home", SOON, || row(pid)["place"] == "home");
    wait_until("the remote half's end", SOON, || !exists(remote));
    let home = row(pid);
    assert_eq!((&home["hops_done"], &home["sent_home"]), (&2.into(), &0.into()), "{home}");
    assert_eq!(home["reason"]["code"], "execve", "{home}");
    take_out(pid);
    assert!(row(pid)["reason"].is_null());
    migrate(pid, "home");
    take_out(pid);
    end.create();
    assert_eq!(program.status_within(SOON).code(), Some(5));
    assert_eq!(said.text(), "first\nsecond True\n");
}
