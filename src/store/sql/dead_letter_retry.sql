-- Gives dead letters to their group again, oldest first, up to so many: how many of which groups.
-- $1 ids  $2 topic  $3 group  $4 partition  $5 text of the last error  $6 died until  $7 how many at most
select topic, group_name, moved from shardmq.dead_letter_retry($1, $2, $3, $4, $5, $6, $7)
