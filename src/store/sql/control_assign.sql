-- Records an assignment, if the one that it was computed from still stands. Primary key.
-- $1 topic  $2 group  $3 version of the one before, 0 for none  $4 basis  $5 members  $6 partitions
-- $7 owners
insert into shardmq_control.assignment as a
       (topic, group_name, version, basis, members, partitions, owners)
select $1, $2, $3::bigint + 1, $4, $5, $6, $7
on conflict (topic, group_name) do update
   set version = excluded.version, basis = excluded.basis, members = excluded.members,
       partitions = excluded.partitions, owners = excluded.owners
 where a.version = $3
returning version
