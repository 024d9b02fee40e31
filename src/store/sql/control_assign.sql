-- Records an assignment, if the one that it was computed from still stands, and the topic. Primary keys.
-- $1 topic  $2 group  $3 version of the one before, 0 for none  $4 basis  $5 members  $6 partitions
-- $7 owners  $8 id of the topic
insert into shardmq_control.assignment as a
       (topic, group_name, version, basis, members, partitions, owners)
select t.topic, $2, $3::bigint + 1, $4, $5, $6, $7
  from shardmq_control.topic t
 where t.topic = $1 and t.topic_id = $8
   for key share
on conflict (topic, group_name) do update
   set version = excluded.version, basis = excluded.basis, members = excluded.members,
       partitions = excluded.partitions, owners = excluded.owners
 where a.version = $3
returning version
