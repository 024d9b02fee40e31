-- Who of a group has which partition. Primary key.
-- $1 topic  $2 group
select version, basis, members, partitions, owners
  from shardmq_control.assignment
 where topic = $1 and group_name = $2
