//! Names that nobody uses are forgotten, with what was counted for them.

use super::*;

#[test]
fn totals_go_with_their_names() {
    let Some(mut world) = World::new("names that are forgotten") else { return };
    let lock = alone();
    let number = |world: &World, name: &str| world.maps().number_of(&lock, name).unwrap();
    let (kept, gone) = (number(&world, "kept"), number(&world, "gone"));
    for (id, tenant) in [(1, kept), (2, gone)] {
        world.pod(id, pod(tenant, [2; 6]), &[]);
        // Too short, which counts.
        let (program, model) = world.judge(Side::Vm, id, &[0; 20]);
        assert_eq!(program, model);
        world.remove_pod(id);
    }
    // One that has counted nothing has no totals.
    let idle = number(&world, "idle");
    world.pod(3, pod(idle, [2; 6]), &[]);
    world.remove_pod(3);
    let totals = |world: &World| {
        let mut tenants: Vec<Tenant> = world.maps().totals().unwrap().into_keys().collect();
        tenants.sort_unstable();
        tenants
    };
    assert_eq!(totals(&world), [kept, gone]);
    world.identity(ip("10.0.0.1"), 32, Identity { tenant: kept, ..Identity::default() });
    world.apply();
    // Not so soon.
    world.maps().spare_names(&lock).unwrap();
    assert_eq!(world.maps().forget_names(&lock, 3).unwrap(), 0);
    assert_eq!(world.maps().forget_names(&lock, 0).unwrap(), 2);
    assert_eq!(totals(&world), [kept]);
    assert_eq!(world.maps().known_number("gone").unwrap(), None);
    assert_eq!(world.maps().known_number("kept").unwrap(), Some(kept));
    // A number is given once.
    assert!(number(&world, "gone") > idle);
}
